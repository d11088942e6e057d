"""Caches of the outputs of frozen parts."""
