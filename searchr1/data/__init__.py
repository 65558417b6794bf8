"""Questions: rows, prompts, the loader, and the preparation of question sets."""
