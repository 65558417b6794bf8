"""The values that a key may have, where the schema's type lists them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from searchr1.config.registered import Registered
from searchr1.config.schema import Config
from searchr1.importing import is_dotted_path


def options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the hint alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def literal_values(hint: Any) -> tuple[str | None, ...]:
    """Return the values of a `Literal`, with None where the hint allows it; empty for a hint without a `Literal`."""
    values = [value for option in options(hint) if typing.get_origin(option) is Literal for value in typing.get_args(option)]
    return (None, *values) if values and type(None) in options(hint) else tuple(values)


def dataclass_of(hint: Any) -> type | None:
    """Return the section that a hint stands for, if it is one."""
    return next((option for option in options(hint) if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def registered(hint: Any) -> Registered | None:
    """Return the registry behind an annotated hint."""
    return next((data for data in getattr(hint, "__metadata__", ()) if isinstance(data, Registered)), None)


def hints(cls: type) -> dict[str, Any]:
    """Return the type hints of a section, annotations included."""
    return typing.get_type_hints(cls, include_extras=True)


def value_of(config: Config, key: str) -> object:
    """Return the value at a dotted key."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def choices_of(key: str) -> tuple[str | None, ...]:
    """Return the values that a dotted key of the schema may have; empty where its type lists none."""
    cls: type = Config
    *sections, name = key.split(".")
    for section in sections:
        inner = dataclass_of(hints(cls)[section])
        assert inner is not None, key
        cls = inner
    hint = hints(cls)[name]
    names = registered(hint)
    return literal_values(_item(hint)) if names is None else names.names()


def choice_problems(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield key and problem of every value that its type does not list.

    Args:
        section: a `Config`, or a section of one.
        prefix: prefix of the keys in the result.
    """
    for name, hint in hints(type(section)).items():
        key, value = f"{prefix}{name}", getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield from choice_problems(value, f"{key}.")
            continue
        names = registered(hint)
        if names is not None:
            if value not in names.names() and not (names.own and is_dotted_path(value)):
                own = ", nor package.module:function" if names.own else ""
                yield key, f"{not_one_of(value, names.names())}{own}"
        elif allowed := literal_values(_item(hint)):
            for item in value if isinstance(value, list) else [value]:
                if item not in allowed:
                    yield key, not_one_of(item, allowed)


def not_one_of(value: object, allowed: tuple[str | None, ...]) -> str:
    """Return the message about a value that is not allowed."""
    return f"{value!r} is not one of {', '.join(map(str, allowed))}"


def own_code_keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield the keys that may name a user's own algorithm."""
    for name, hint in hints(cls).items():
        inner, names = dataclass_of(hint), registered(hint)
        if inner is not None:
            yield from own_code_keys(inner, f"{prefix}{name}.")
        elif names is not None and names.own:
            yield f"{prefix}{name}"


def _item(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
