"""The retrieval server's HTTP interface and its processes."""
