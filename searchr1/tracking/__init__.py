"""What a run writes: metrics, loggers, the trajectory log, the progress line."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.tracking.loggers import Logger, read_metrics
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "loggers": ["Logger", "read_metrics"],
        },
    )

__all__ = [
    "Logger",
    "read_metrics",
]
