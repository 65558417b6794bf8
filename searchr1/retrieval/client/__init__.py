"""The client of the retrieval server, and how it chooses among several servers."""
