"""What a run writes: metrics, loggers, the trajectory log, the progress line."""
