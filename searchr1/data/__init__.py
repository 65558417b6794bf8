"""Questions: rows, prompts, the loader, and the preparation of question sets."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.data.dataset import load_data
    from searchr1.data.loader import PromptLoader
    from searchr1.data.prompts import render_prompt
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "dataset": ["load_data"],
            "loader": ["PromptLoader"],
            "prompts": ["render_prompt"],
        },
    )

__all__ = [
    "PromptLoader",
    "load_data",
    "render_prompt",
]
