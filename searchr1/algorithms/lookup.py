"""An algorithm by its name, or by the dotted path of a user's own function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from searchr1.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])


def is_dotted_path(name: object) -> bool:
    """Whether it is meant as `package.module:function` (or `package.module.function`)."""
    return isinstance(name, str) and (":" in name or "." in name)


def find_function(known: Mapping[str, Function], name: str, key: str) -> Function:
    """The function behind a name in `known`, or behind a dotted path.

    Args:
        known: the registry.
        name: what the YAML says.
        key: the YAML's key, for the message.

    Raises:
        UserError: neither.
    """
    if name in known:
        return known[name]
    if not is_dotted_path(name):
        raise UserError(f"{key}: unknown '{name}'; use one of {', '.join(sorted(known))}, or package.module:function")
    module, _, attribute = name.replace(":", ".").rpartition(".")
    try:
        function: Function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{key}: cannot import '{name}': {error}; is its folder in PYTHONPATH?") from error
    if not callable(function):
        raise UserError(f"{key}: '{name}' is not a function")
    return function
