"""The scripts that start servers: their flags are the programs', and an unedited path is told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from searchr1.commands import build_index as build
from searchr1.commands import rerank_server
from searchr1.commands import retrieval_server as server_flags

EXAMPLES = Path(__file__).parents[2] / "examples/searchr1"
SCRIPTS = sorted(
    [*(EXAMPLES / "retrieval").glob("launch_*.sh"), EXAMPLES / "launch_local_server.sh", EXAMPLES / "build_index.sh"]
)
PARSERS = {"retrieval-server": server_flags.parse, "rerank-server": rerank_server.parse, "build-index": build.parse}
KEYS = dict.fromkeys(["SERPER_API_KEY", "SERPAPI_API_KEY", "GOOGLE_API_KEY", "GOOGLE_CSE_ID", "BRAVE_API_KEY"], "k")


def run(script, folder, *flags, **variables):
    """Run a script with programs that only write down their arguments."""
    for name in ("searchr1", "python"):
        program = folder / name
        program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        program.chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)} | KEYS | variables
    return subprocess.run(["bash", str(script), *flags], env=env, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_flags_are_understood(script, tmp_path):
    result = run(script, tmp_path, WIKI2018_WORK_DIR=str(tmp_path), reranker=str(tmp_path))
    assert result.returncode == 0, result.stderr
    program, *flags = result.stdout.splitlines()
    if program.endswith("local_retrieval_server.py"):
        program = "retrieval-server"
    PARSERS[program](flags)
    assert not any("/path/to" in flag for flag in flags)
    if "--port" in flags:
        more = run(script, tmp_path, "--port", "1234", WIKI2018_WORK_DIR=str(tmp_path), reranker=str(tmp_path))
        assert PARSERS[program](more.stdout.splitlines()[1:]).port == 1234


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "/path/to" in s.read_text()], ids=lambda path: path.name)
def test_a_path_that_was_not_edited_is_reported(script, tmp_path):
    result = run(script, tmp_path)
    assert result.returncode == 2
    assert "set " in result.stderr
    assert result.stdout == ""
