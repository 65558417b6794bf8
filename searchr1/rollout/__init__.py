"""The vLLM engine behind a small interface, and weight updates into it."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.rollout.engine import Engine
    from searchr1.rollout.settings import EngineSettings
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "engine": ["Engine"],
            "settings": ["EngineSettings"],
        },
    )

__all__ = [
    "Engine",
    "EngineSettings",
]
