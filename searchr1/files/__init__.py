"""Files on disk: atomic writes, locks, checksums, and rows that others wrote."""
