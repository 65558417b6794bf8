"""The training loop, supervised fine-tuning, and what belongs to a run: its folder, its health, its weight updates."""
