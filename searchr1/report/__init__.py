"""Read runs: summaries, curves and the trajectory viewer."""
