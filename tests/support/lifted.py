"""Functions of other projects, compiled from their installed files one by one.

Importing TRL's trainer or all of verl takes tens of seconds, and needs packages that have nothing to do with a formula.
Assertions (RLinf insists on fp32) and decorators are left out; what a function says is not touched.
"""

from __future__ import annotations
import __future__

import ast
import functools
import importlib.util
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch


@functools.cache
def _functions(file: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: _Bare().visit(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


class _Bare(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.Pass:
        return ast.Pass()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list = []
        self.generic_visit(node)
        return node


def lift(package: str, path: str, *names: str, **known: Any) -> SimpleNamespace:
    """Functions and methods by name, from `path` in an installed package; skips the test where there is none.

    Args:
        package: what is installed.
        path: of the file in it.
        names: functions of the file, those that others need for their defaults first.
        known: what else they use.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    file = Path(spec.origin).parent / path
    found = _functions(file)
    module = ast.Module([found[name] for name in names], [])
    code = compile(
        ast.fix_missing_locations(module), str(file), "exec",
        # No annotation is looked at.
        flags=__future__.annotations.compiler_flag, dont_inherit=True,
    )  # fmt: skip
    scope: dict[str, Any] = {
        "torch": torch,
        "F": torch.nn.functional,
        "np": np,
        "math": math,
        "defaultdict": defaultdict,
        **known,
    }
    exec(code, scope)
    return SimpleNamespace(**{name: scope[name] for name in names})
