"""Packed rows without padding: layouts, shared prefixes, attention, and memory-efficient log-probabilities."""
