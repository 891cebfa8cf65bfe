"""Data sets, views and the Lightning data module."""
