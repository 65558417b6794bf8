"""The import graph of searchr1, derived from its sources: no cycle, and no room imports from a room above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "searchr1"
ROOMS = (
    "base", "algorithms", "config", "checkpoints", "ui", "retrieval", "agent", "rewards", "data", "rollout", "tracking",
    "learner", "preflight", "cluster", "report", "evaluation", "training", "chat", "demo", "commands", "cli", "__main__",
    "searchr1",
)  # fmt: skip
"""From low to high. A room may import itself and what stands before it; `searchr1` is the package's own face, whose names
lead everywhere."""
BASE = {
    "errors", "exports", "streams", "nvidia", "device", "shutdown", "progress", "caches", "files", "importing", "retry",
    "http_guard",
}  # fmt: skip
"""Modules that any room may import."""
REPAIRED_SOON: dict[tuple[str, str], str] = {}
"""Imports upwards or in a circle that are being repaired, with how; none may be added."""

Graph = Mapping[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for file in root.rglob("*.py"):
        parts = file.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(source: str, module: str, names: set[str], typing_too: bool) -> Iterator[str]:
    """Yield the modules of `names` that a source imports, inside functions as well.

    Args:
        source: Python.
        module: its dotted name, which relative imports start from.
        names: modules of the package.
        typing_too: also what is imported for type checkers only.
    """
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not typing_too:
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            start = "" if not node.level else ".".join(module.split(".")[: -node.level])
            origin = ".".join(part for part in (start, node.module) if part)
            for alias in node.names:
                if f"{origin}.{alias.name}" in names:
                    yield f"{origin}.{alias.name}"
                elif origin in names and (origin, alias.name) != ("searchr1", "__version__"):
                    yield origin


def import_graph(typing_too: bool) -> dict[str, set[str]]:
    """Return module -> modules that it imports."""
    files = modules(ROOT)
    return {
        name: {
            other
            for other in imports(file.read_text(encoding="utf-8"), name, set(files), typing_too)
            if other != name and (name, other) not in REPAIRED_SOON
        }
        for name, file in files.items()
    }


def room(module: str) -> str:
    """Return the room of a module: the folder or file below `searchr1/`."""
    name = module.split(".")[1] if "." in module else module
    return "base" if name in BASE else name


def find_cycle(graph: Graph) -> list[str]:
    """Return the modules of one cycle in their order, the first one again at the end; empty if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if cycle := walk(other, [*path, name]):
                return cycle
        done.add(name)
        return []

    return next((cycle for name in sorted(graph) if (cycle := walk(name, []))), [])


def upward(graph: Graph) -> set[tuple[str, str]]:
    """Return the imports whose target stands in a higher room."""
    rank = {name: number for number, name in enumerate(ROOMS)}
    return {(a, b) for a, targets in graph.items() for b in targets if rank[room(b)] > rank[room(a)]}


def test_every_module_belongs_to_a_room() -> None:
    assert {room(name) for name in modules(ROOT)} <= set(ROOMS)


def test_imports_have_no_cycle() -> None:
    assert find_cycle(import_graph(typing_too=False)) == []


def test_no_room_imports_from_a_room_above() -> None:
    assert sorted(upward(import_graph(typing_too=True))) == []


NAMES = {"searchr1", "searchr1.agent", "searchr1.agent.loop", "searchr1.chat.load", "searchr1.errors"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import searchr1.errors", {"searchr1.errors"}),
        ("from searchr1.errors import UserError", {"searchr1.errors"}),
        ("from searchr1.agent import loop", {"searchr1.agent.loop"}),
        ("from searchr1 import __version__", set()),
        ("from searchr1 import load_config", {"searchr1"}),
        ("def f():\n    from searchr1.chat.load import x", {"searchr1.chat.load"}),
        ("from . import loop\nfrom ..chat.load import x", {"searchr1.agent.loop", "searchr1.chat.load"}),
        ("import torch\nfrom os import path", set()),
        ("if TYPE_CHECKING:\n    import searchr1.errors", set()),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import searchr1.errors", {"searchr1.errors"}),
    ],
)
def test_imports_are_read_from_the_source(source: str, expected: set[str]) -> None:
    assert set(imports(source, "searchr1.agent.tools", NAMES, typing_too=False)) == expected


def test_imports_for_type_checkers_count_for_the_order_of_rooms() -> None:
    source = "if TYPE_CHECKING:\n    import searchr1.errors"
    assert set(imports(source, "searchr1.agent.tools", NAMES, typing_too=True)) == {"searchr1.errors"}


def test_a_cycle_is_found_through_other_modules() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_an_import_from_a_higher_room_is_found() -> None:
    graph = {"searchr1.errors": {"searchr1.chat.load"}, "searchr1.chat.load": {"searchr1.errors", "searchr1.files.lfs"}}
    assert upward(graph) == {("searchr1.errors", "searchr1.chat.load")}
