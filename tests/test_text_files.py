"""Text files are read and written in UTF-8, not in the encoding of whoever runs the program."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    file for folder in ("searchr1", "examples", "toolkits", "benchmarks") for file in (ROOT / folder).rglob("*.py")
)
MODE_AT = {"read_text": None, "write_text": None, "open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}
"""Position of the mode; where a method of a path has it is one before."""


def opens_text_as_the_locale_says(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name not in MODE_AT or "encoding" in keywords or None in keywords:
        return False
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return len(call.args) == 1
    of_object = isinstance(function, ast.Attribute) and name == "open"
    at = 0 if of_object else MODE_AT[name]
    mode = keywords.get("mode", call.args[at] if len(call.args) > at else None)
    if of_object and getattr(function.value, "id", "") in (
        "gzip",
        "bz2",
        "lzma",
        "os",
        "tarfile",
        "Image",
        "zipfile",
        "mmap",
    ):
        mode = call.args[1] if len(call.args) > 1 else None
        return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "t" in mode.value
    if mode is None:
        return not of_object and name in ("open", "fdopen")
    is_mode = isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) <= set("rwaxbt+")
    return is_mode and "b" not in mode.value


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        ("p.read_text()", True),
        ("p.write_text(x)", True),
        ("p.open('w')", True),
        ("open(p)", True),
        ("open(p, mode='a')", True),
        ("gzip.open(p, 'rt')", True),
        ("NamedTemporaryFile('w')", True),
        ("p.read_text(encoding='utf-8')", False),
        ("p.open('rb')", False),
        ("gzip.open(p)", False),
        ("os.open(p, flags)", False),
        ("Ledger.open(folder)", False),
    ],
)
def test_the_check_knows_one_from_the_other(code, bad):
    assert opens_text_as_the_locale_says(ast.parse(code, mode="eval").body) is bad


def test_every_text_file_has_its_encoding_named():
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text_as_the_locale_says(node)
    ]
    assert not found
