"""Evaluate models: methods, ledger, tables, published numbers, and the driver."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.evaluation.results import Results
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "results": ["Results"],
        },
    )

__all__ = [
    "Results",
]
