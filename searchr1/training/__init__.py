"""The training loop, supervised fine-tuning, and what belongs to a run: its folder, its health, its weight updates."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.training.run_folder import RunFolder
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "run_folder": ["RunFolder"],
        },
    )

__all__ = [
    "RunFolder",
]
