"""Pseudo-labels as files: how they are made, where they lie, what they hold."""
