"""Retrieval: corpus, pages, indexes, the server, and the client that the agent uses."""
