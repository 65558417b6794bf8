"""The loops: training, evaluation, supervised fine-tuning, and the demo that runs them all."""
