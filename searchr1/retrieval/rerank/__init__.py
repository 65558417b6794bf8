"""A second stage that reorders passages with a cross-encoder."""
