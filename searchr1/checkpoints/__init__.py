"""Files of checkpoints, read without running anything that they name and without more memory than they are worth."""
