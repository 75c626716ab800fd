"""Held-out loss, exact match and choices of a model."""
