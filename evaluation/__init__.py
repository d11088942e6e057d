"""Evaluation: one module a table, the systems that reply, metrics and statistics, the report and the human study."""
