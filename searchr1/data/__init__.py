"""Questions: rows, prompts, the loader, and the demo world."""
