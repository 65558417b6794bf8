"""Lines, JSON and text of files that others wrote: bounded in memory, with a message for whatever is wrong with them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any

MAX_LINE_BYTES = 64 << 20
"""A longer line is not a row; without a bound, a file without line ends would be read into memory whole."""
MAX_DEPTH = 200
"""Lists and objects inside each other: more is not data, and what writes JSON stops at about 250."""
TOO_DEEP = f"not valid JSON (lists and objects are nested more than {MAX_DEPTH} deep)"
BLOCK_BYTES = 1 << 20


class LineTooLong(ValueError):
    """A line that is longer than is read."""

    def __init__(self, line: int, limit: int) -> None:
        size = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
        super().__init__(f"the line is longer than {size}; write one row on each line")
        self.line = line


def split_lines(
    read: Callable[[int], bytes], *, block_bytes: int = BLOCK_BYTES, max_bytes: int | None = None
) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number from 1, offset, line without its line feed) of what `read` gives.

    Only line feeds end a line, as in JSON Lines; every byte is looked at once, whatever the length of the lines.

    Raises:
        LineTooLong: a line of more than `max_bytes` (`MAX_LINE_BYTES` without it).
    """
    limit = MAX_LINE_BYTES if max_bytes is None else max_bytes
    number, start = 0, 0
    begun: list[bytes] = []  # the parts of a line whose end has not been read
    length = 0
    while block := read(block_bytes):
        first, *others = block.split(b"\n")
        begun.append(first)
        length += len(first)
        for part in others:
            if length > limit:
                raise LineTooLong(number + 1, limit)
            number += 1
            yield number, start, b"".join(begun)
            start += length + 1
            begun, length = [part], len(part)
        if length > limit:
            raise LineTooLong(number + 1, limit)
    if length:
        yield number + 1, start, b"".join(begun)


def decode(data: bytes, first: bool = False) -> str:
    """Decode a line from UTF-8; a byte order mark may stand before the `first`.

    Raises:
        ValueError: another encoding; names the likely one.
    """
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(error)) from error


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return the message that bytes are not UTF-8, with the fix."""
    return (
        f"not UTF-8 ({error.reason}, byte 0x{error.object[error.start]:02x}); it may be Latin-1 or another encoding: save "
        "the file as UTF-8"
    )


def other_encoding(head: bytes) -> str | None:
    """Name the encoding of a text file that begins with `head`, if it is UTF-16 or UTF-32; None for any other."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    # Without a mark: every second byte of JSON's or a table's first characters is zero.
    pairs = head[: len(head) // 2 * 2]
    if len(pairs) >= 4 and (set(pairs[0::2]) == {0} or set(pairs[1::2]) == {0}) and set(pairs) != {0}:
        return "UTF-16"
    return None


def parse_json(text: str) -> Any:
    """Parse JSON; NaN and half surrogate pairs are taken, as Python's `json` takes them.

    Raises:
        ValueError: no JSON, a number of thousands of digits, or nested too deeply.
    """
    try:
        return require_shallow(json.loads(text), text.count("[") + text.count("{"))
    except (ValueError, RecursionError) as error:
        raise ValueError(json_problem(error)) from error


def json_problem(error: ValueError | RecursionError) -> str:
    """Return what a reader of JSON complains of, without the line, which it counts from where it began."""
    if isinstance(error, RecursionError) or str(error) == TOO_DEEP:
        return TOO_DEEP
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg.removesuffix(' at')} at character {error.colno})"
    return f"not valid JSON ({str(error).partition(';')[0]})"  # a whole number of more digits than are read


def require_shallow(value: Any, brackets: int) -> Any:
    """Return a parsed value; `brackets` is the number of opening ones in its text.

    Raises:
        ValueError: it is nested too deeply.
    """
    level = [value] if brackets > MAX_DEPTH and isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = (each for item in level for each in (item.values() if isinstance(item, dict) else item))
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return value
    raise ValueError(TOO_DEEP)


def whole_text(text: str) -> str:
    """Return `text` with U+FFFD in place of every half of a surrogate pair; two halves of one character become it."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
