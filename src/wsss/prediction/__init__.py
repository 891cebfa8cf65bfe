"""Masks of a user's own images: finding and reading them, segmenting them, writing results."""
