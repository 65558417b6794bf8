"""The retrieval server, its indexes and its client."""
