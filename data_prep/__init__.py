"""Corpora, brought to one schema, and the views that training takes of them."""
