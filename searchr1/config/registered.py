"""The type of a key whose values are the names in a registry of functions."""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Registered:
    """Metadata of a schema field, as in `Annotated[str, Registered("package.module:REGISTRY")]`."""

    registry: str
    """Where the dictionary of names is; it is imported when its names are asked for."""
    more: tuple[str, ...] = ()
    """Names beside those of the registry."""
    own: bool = False
    """Whether a user's function, `package.module:function`, may stand instead of a name."""

    def names(self) -> tuple[str, ...]:
        module, _, attribute = self.registry.partition(":")
        return (*getattr(importlib.import_module(module), attribute), *self.more)
