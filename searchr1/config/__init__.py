"""The YAML tree: its schema, loading, checking and explaining."""
