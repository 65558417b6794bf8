"""Parse `key=value` arguments: the value is what follows the first `=`, read by Hydra's grammar or else as plain text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from searchr1.errors import UserError

EXAMPLE = "write KEY=VALUE, for instance runner.max_steps=10"
_CLOSING = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True, slots=True)
class Override:
    """One `key=value` argument."""

    key: str
    text: str
    """The value as the user wrote it."""
    hydra: str
    """The argument in the form that Hydra's parser accepts."""


def read_override(argument: str) -> Override:
    """Parse one argument; what Hydra's grammar rejects, or reads as a sweep, is text, or a list or mapping of texts.

    Raises:
        UserError: no key, an invalid key, no `=`, or an unreadable `${`.
    """
    name, equals, text = argument.partition("=")
    mark = name[: len(name) - len(name.lstrip("+~"))]
    key = name[len(mark) :]
    if mark not in ("", "+", "++", "~") or "@" in key or not key or _parsed(key, "1") is None:
        raise UserError(f"{name!r}", f"is no key; {EXAMPLE}")
    if not equals and mark != "~":
        raise UserError(key, f"has no value; write {key}=VALUE ({key}=null for none)")
    if mark == "~":
        return Override(key, text, argument)
    if not _references_are_readable(text):
        raise UserError(
            key,
            f"{text!r} holds a ${{ that begins no readable reference to a key; a text as it stands is written "
            f"{quoted(key, text)}",
        )
    # `++` sets keys that the file leaves out as well; a misspelt one is reported later, with the nearest name.
    return Override(key, text, f"{mark or '++'}{key}={_readable(text)}")


def quoted(key: str, text: str) -> str:
    """Return the shell argument that sets `key` to exactly this text."""
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # a backslash keeps OmegaConf from reading a reference
    return shlex.quote(f"{key}={_quoted(escaped)}")


def _references_are_readable(text: str) -> bool:
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError

    try:
        OmegaConf.create([text])
    except GrammarParseError:
        return False
    return True


def _readable(text: str) -> str:
    """Return a value in a form that Hydra's parser accepts."""
    parsed = _parsed("key", text)
    if parsed is not None and not parsed.is_sweep_override():
        return text
    inner = text.strip()
    if inner[:1] == "[" and inner[-1:] == "]":
        return f"[{','.join(map(_item, _split(inner[1:-1])))}]"
    if inner[:1] == "{" and inner[-1:] == "}":
        pairs = [
            (name.strip().strip("'\""), value) for name, _, value in (part.partition(":") for part in _split(inner[1:-1]))
        ]
        if all(value.strip() and _parsed("key", f"{{{name}:1}}") is not None for name, value in pairs):
            return "{" + ",".join(f"{name}:{_item(value.strip())}" for name, value in pairs) + "}"
    return _quoted(text)


def _item(text: str) -> str:
    """Return an item of a list or mapping, quoted so that a trailing backslash does not escape the next comma."""
    parsed = _parsed("key", text)
    value = None if parsed is None or parsed.is_sweep_override() else parsed.value()
    return _quoted(value) if isinstance(value, str) else _readable(text)


def _parsed(key: str, text: str) -> Any:
    """Return Hydra's parsed override, or None if its grammar rejects the text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException:
        return None


def _quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    quoted_text: str = QuotedString(text, Quote.double).with_quotes()
    return quoted_text


def _split(text: str) -> Iterator[str]:
    """Yield the parts between top-level commas: those outside of brackets and quotes."""
    part, open_brackets, quote = "", [], ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and not part.strip():
            quote = char
        elif char in _CLOSING:
            open_brackets.append(_CLOSING[char])
        elif open_brackets and char == open_brackets[-1]:
            open_brackets.pop()
        elif char == "," and not open_brackets:
            yield part.strip()
            part = ""
            continue
        part += char
    if part.strip():
        yield part.strip()
