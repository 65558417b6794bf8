"""Limits on a YAML's size: a few lines of anchors or references can expand to very many values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from searchr1.errors import UserError

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 100
MAX_REFERRED = 16 << 20
"""Limit of characters and values that a key may expand to through its references."""
_REFERENCE = re.compile(r"\$\{([^${}:]+)\}")


def require_bounded(path: Path) -> None:
    """Check a YAML, and those beside it that its `defaults` name, before they are expanded.

    Raises:
        UserError: too large, nested too deeply, or too many values through its anchors.
    """
    waiting = [path]
    seen: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        with file.open("rb") as opened:
            text = opened.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(file, f"is larger than {MAX_BYTES >> 20} MiB; that is no configuration")
        try:
            _require_few(file, text)
            waiting += _named_files(path.parent, yaml.safe_load(text))
        except (yaml.YAMLError, ValueError, TypeError, LookupError):
            continue  # reported by whoever reads the file


def _require_few(file: Path, text: bytes) -> None:
    """Count the values, an alias with all values of its anchor; raise a `UserError` if there are too many."""
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, values so far
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor is not None:
                sizes[event.anchor] = size
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            size = 1
        else:
            size = 0
        total += size
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        if len(open_nodes) > MAX_DEPTH:
            raise UserError(file, f"line {_line(event)}: sections and lists are nested more than {MAX_DEPTH} deep")
        if total > MAX_VALUES:
            raise UserError(
                file, f"line {_line(event)}: stands for more than {MAX_VALUES} values, with its anchors; write fewer"
            )


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 1


def _named_files(folder: Path, values: Any) -> Iterator[Path]:
    """Yield the files that a `defaults` list may name."""
    names = values.get("defaults") if isinstance(values, dict) else None
    for item in names if isinstance(names, list) else []:
        pairs = item.items() if isinstance(item, dict) else [("", item)]
        for group, name in pairs:
            if isinstance(group, str) and isinstance(name, str):
                group = group.removeprefix("override ").removeprefix("optional ").partition("@")[0].strip("/ ")
                yield folder / group / f"{name.partition('@')[0].strip('/ ')}.yaml"


def require_bounded_references(source: Path, tree: Any) -> None:
    """Check how much the references (`${key}`) of a tree expand to, before they are resolved.

    Args:
        source: the tree's file, for messages.
        tree: nested dictionaries and lists, with the references as text.

    Raises:
        UserError: too much, or a chain of too many references.
    """
    known: dict[str, tuple[int, int]] = {}

    def measure(value: Any, key: str, depth: int) -> tuple[int, int]:
        """Return the expanded size of a value, and the length of its longest chain of references."""
        if key in known:
            return known[key]
        known[key] = (0, 0)  # what refers to itself is reported by whoever follows it
        size, hops = 1, 0
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            parts = [measure(item, f"{key}.{name}", depth) for name, item in items]
        else:
            text = value if isinstance(value, str) else ""
            size += len(text)
            targets = [_target(key, name.strip()) for name in _REFERENCE.findall(text)]
            # Deeper than this is rejected below; the count keeps this function's own depth within bounds.
            parts = [measure(_value_at(tree, target), target, depth + 1) for target in targets if depth <= MAX_DEPTH]
            hops = 1 if targets else 0
        for more, further in parts:
            size, hops = size + more, max(hops, further + (not isinstance(value, dict | list)))
        where = f"{source}: {key[1:]}" if key else str(source)
        if size > MAX_REFERRED:
            raise UserError(where, f"stands for more than {MAX_REFERRED >> 20} MiB; write fewer references")
        if hops > MAX_DEPTH:
            raise UserError(where, f"leads over more than {MAX_DEPTH} references; write the value")
        known[key] = (size, hops)
        return size, hops

    measure(tree, "", 0)


def _target(key: str, name: str) -> str:
    """Return the key that a reference in `key` names; `.x` is in the same section, `..x` in the one above."""
    path = name.lstrip(".")
    dots = len(name) - len(path)
    sections = key.split(".")[:-dots] if dots else [""]
    return ".".join([*sections, *path.replace("]", "").replace("[", ".").split(".")])


def _value_at(tree: Any, key: str) -> Any:
    value = tree
    for name in key.split(".")[1:]:
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value
