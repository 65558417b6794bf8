"""The YAML tree: its schema, loading, and the translation of RLinf's keys."""
