"""Corpus adapters, which read the tables and locate the clips of each corpus."""
