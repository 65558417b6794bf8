"""An algorithm by its name, or by the dotted path of a user's own function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from searchr1.errors import UserError
from searchr1.importing import import_function, is_dotted_path

Function = TypeVar("Function", bound=Callable[..., Any])


def find_function(known: Mapping[str, Function], name: str, key: str) -> Function:
    """Return the function that a name in `known`, or a dotted path, stands for.

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
        raise UserError(key, f"unknown '{name}'; use one of {', '.join(sorted(known))}, or package.module:function")
    return cast(Function, import_function(name, key))
