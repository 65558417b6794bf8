"""Whether a YAML is small enough to be a configuration: a few lines of anchors can stand for billions of values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from searchr1.errors import UserError

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 100


def require_bounded(path: Path) -> None:
    """Check a YAML, and those beside it that its `defaults` name, before anything is made of them.

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
            raise UserError(f"{file}: is larger than {MAX_BYTES >> 20} MiB; that is no configuration")
        try:
            _require_few(file, text)
            waiting += _named_files(path.parent, yaml.safe_load(text))
        except (yaml.YAMLError, ValueError, TypeError, LookupError):
            continue  # what reads it says what is wrong


def _require_few(file: Path, text: bytes) -> None:
    """Count the values, an alias as all that its anchor stands for."""
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
            raise UserError(f"{file}: line {_line(event)}: sections and lists are nested more than {MAX_DEPTH} deep")
        if total > MAX_VALUES:
            raise UserError(
                f"{file}: line {_line(event)}: stands for more than {MAX_VALUES} values, with its anchors; write fewer"
            )


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 1


def _named_files(folder: Path, values: Any) -> Iterator[Path]:
    """Yield what a `defaults` list may mean."""
    names = values.get("defaults") if isinstance(values, dict) else None
    for item in names if isinstance(names, list) else []:
        pairs = item.items() if isinstance(item, dict) else [("", item)]
        for group, name in pairs:
            if isinstance(group, str) and isinstance(name, str):
                group = group.removeprefix("override ").removeprefix("optional ").partition("@")[0].strip("/ ")
                yield folder / group / f"{name.partition('@')[0].strip('/ ')}.yaml"
