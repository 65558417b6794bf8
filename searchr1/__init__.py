"""searchr1: reinforcement learning of language models that reason and search."""

__version__ = "0.1.0"
