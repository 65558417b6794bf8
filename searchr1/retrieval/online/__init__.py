"""Online search engines behind the server's /retrieve."""
