"""What an evaluation found: metrics with intervals, tables, published numbers, files. Imports neither Ray nor vLLM."""
