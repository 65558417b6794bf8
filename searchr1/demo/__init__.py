"""The demo world (a fictional encyclopedia with questions) and the demo that trains on it."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.demo.files import write_world
    from searchr1.demo.world import World, make_world
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "files": ["write_world"],
            "world": ["World", "make_world"],
        },
    )

__all__ = [
    "World",
    "make_world",
    "write_world",
]
