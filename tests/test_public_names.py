"""The package's public names: each room's `__all__`, what importing them costs, and their page in the docs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import searchr1

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "searchr1"
INTERNAL = {"commands", "files", "ui"}
"""Rooms whose names are for the others only."""
ROOMS = [
    "searchr1",
    *(f"searchr1.{path.parent.name}" for path in sorted(PACKAGE.glob("*/__init__.py")) if path.parent.name not in INTERNAL),
]
PUBLIC = [(room, name) for room in ROOMS for name in importlib.import_module(room).__all__ if name != "__version__"]
DOCUMENTED = set(re.findall(r"^::: (\S+)$", (ROOT / "docs/reference/api.md").read_text(encoding="utf-8"), re.M))
LIGHT = (
    "load_config", "Config", "ConfigError", "UserError", "WorkerDied", "Sample", "Trajectory", "Turn", "Tool", "ToolResult",
    "run_trajectory", "SearchClient", "SearchUnavailable", "RetrievedDocument", "answer_of", "exact_match", "f1_score",
    "substring_match",
)  # fmt: skip
"""Names that the client alone (`pip install searchr1`) must give."""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("room", "name"), PUBLIC)
def test_a_public_name_imports_has_a_docstring_and_is_documented(room: str, name: str) -> None:
    value = getattr(importlib.import_module(room), name)
    assert inspect.isclass(value) or inspect.isfunction(value)
    assert not (value.__doc__ or "").startswith((f"{name}(", "Create a new ")), "a docstring that Python made up"
    assert inspect.getdoc(value)
    assert f"{value.__module__}.{value.__qualname__}" in DOCUMENTED
    assert name in dir(importlib.import_module(room))


@pytest.mark.parametrize("room", ROOMS)
def test_the_names_for_editors_are_those_at_run_time(room: str) -> None:
    """The block for type checkers, the table of lazy imports and `__all__` hold the same; no name hides a module."""
    folder = PACKAGE.parent / room.replace(".", "/")
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    typed, table = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module not in ("typing", "searchr1.exports"):
            typed |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Dict):
            table |= {name: f"{room}.{module}" for module, names in ast.literal_eval(node).items() for name in names}
    assert table == typed
    assert set(importlib.import_module(room).__all__) - {"__version__"} == set(table)
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert not modules & set(table)


def test_importing_the_package_imports_no_library() -> None:
    names = run("import searchr1, sys; print(*sys.modules)").split()
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) <= {"searchr1", "__main__"} | site_modules()
    assert {name for name in names if name.startswith("searchr1")} == {"searchr1", "searchr1.exports"}


def site_modules() -> set[str]:
    """What Python itself imports at its start, by the .pth files of this environment."""
    return {name.split(".")[0] for name in run("import sys; print(*sys.modules)").split()}


def test_the_light_names_need_none_of_the_extras() -> None:
    """In a process in which the libraries of the extras cannot be imported."""
    blocked = (
        "torch transformers tokenizers safetensors vllm ray rlinf megatron faiss fastapi starlette pydantic uvicorn orjson"
    )
    blocked += (
        " bm25s numba peft accelerate psutil tensorboard httpx sentence_transformers trafilatura msgspec prometheus_client"
    )
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked.split()!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import searchr1
for name in {LIGHT!r}:
    getattr(searchr1, name)
print(searchr1.exact_match("Paris", ["paris"]), searchr1.load_config("tiny-cpu").runner.max_steps)
"""
    assert run(code).split() == ["1.0", "40"]


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'searchr1' has no attribute 'nothing'"):
        searchr1.nothing  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'searchr1\.data' has no attribute 'nothing'"):
        importlib.import_module("searchr1.data").nothing  # noqa: B018


def test_a_name_is_looked_up_once() -> None:
    assert searchr1.load_config is searchr1.load_config
    assert "load_config" in vars(searchr1)
