"""The demo world (a fictional encyclopedia with questions) and the demo that trains on it."""
