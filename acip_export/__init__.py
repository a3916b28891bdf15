"""Rank a transformer once, export it at any size."""

__version__ = "0.1.0"
