"""What a run tells: metrics, loggers, the trajectory log, the progress line, the report."""
