"""The type of a key whose values are the names in a registry of functions."""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Registered:
    """Metadata of a schema field, as in `Annotated[str, Registered("package.module:REGISTRY")]`."""

    registry: str
    """`module:attribute` of the dictionary of names; imported on first use."""
    more: tuple[str, ...] = ()
    """Further names that the registry lacks."""
    own: bool = False
    """Whether a user's function, `package.module:function`, is allowed instead of a name."""

    def names(self) -> tuple[str, ...]:
        """Return every allowed name."""
        module, _, attribute = self.registry.partition(":")
        return (*getattr(importlib.import_module(module), attribute), *self.more)
