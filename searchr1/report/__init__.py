"""Read runs: summaries, curves and the trajectory viewer."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.report.page import write_report
    from searchr1.report.summary import Summary, summarise
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "page": ["write_report"],
            "summary": ["Summary", "summarise"],
        },
    )

__all__ = [
    "Summary",
    "summarise",
    "write_report",
]
