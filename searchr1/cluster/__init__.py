"""Worker groups on Ray, started through RLinf's scheduler; no algorithm lives here."""
