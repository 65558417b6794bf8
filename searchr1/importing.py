"""Functions of the user's own, named by dotted paths in the YAML."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from searchr1.errors import UserError


def is_dotted_path(name: object) -> bool:
    """Return whether a value has the form `package.module:function` (or `package.module.function`)."""
    return isinstance(name, str) and (":" in name or "." in name)


def import_function(path: str, key: str) -> Callable[..., Any]:
    """Import the function at `package.module:function` (or `package.module.function`).

    Args:
        path: the dotted path.
        key: the YAML key that holds it, for messages.

    Raises:
        UserError: the module cannot be imported, or has no such function.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(key, f"cannot import '{path}': {error}; is its folder in PYTHONPATH?") from error
    if not callable(function):
        raise UserError(key, f"'{path}' is not a function; name one as package.module:function")
    return function
