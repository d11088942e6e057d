"""Preparation of corpora in one schema, and the training views of the prepared data."""
