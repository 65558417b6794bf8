"""The vLLM engine behind a small interface, and weight updates into it."""
