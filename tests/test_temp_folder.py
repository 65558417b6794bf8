from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from searchr1.errors import UserError
from searchr1.files import temp_folder
from searchr1.files.temp_folder import RAY_BYTES, VARIABLES, VLLM_BYTES, shorten_temp_folder


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)


def folder_of(parent: Path, size: int, letter: str = "x") -> Path:
    """A folder whose path has this many bytes, or one less."""
    name = letter * ((size - len(os.fsencode(parent)) - 1) // len(letter.encode()))
    parent.joinpath(name).mkdir()
    return parent / name


@pytest.fixture
def near():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def binds(folder: str, name: str) -> bool:
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.bind(os.path.join(folder, name))
        except OSError:
            return False
    return True


def test_the_limits_are_those_of_the_system(near):
    for most, name in (
        (RAY_BYTES, "ray-session_2026-01-02_03-04-05_678901_1234567-sockets-plasma_store"),
        (VLLM_BYTES, "01234567-89ab-cdef-0123-456789abcdef"),
    ):
        assert binds(str(folder_of(near, most)), name)
        assert not binds(str(folder_of(near, most + 1)), name)


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("letter", ["x", "ä", "漢"])
def test_a_long_folder_is_reached_by_a_short_path(tmp_path, monkeypatch, capsys, variable, letter):
    folder = folder_of(tmp_path, 230, letter)
    monkeypatch.setenv(variable, str(folder))
    shorten_temp_folder(RAY_BYTES)
    short = os.environ[variable]
    assert len(os.fsencode(short)) <= RAY_BYTES
    assert os.path.samefile(short, folder)
    private = Path(short).parent
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert (
        f"{variable}: {folder} is too long for sockets ({len(os.fsencode(folder))} bytes); reached as {short} instead"
        in (capsys.readouterr().out)
    )
    assert binds(short, "x" * (107 - len(short) - 1))
    shorten_temp_folder(RAY_BYTES)  # a second time changes nothing
    assert os.environ[variable] == short
    (folder / "kept").touch()
    temp_folder._remove(str(private), os.getpid())
    assert not private.exists()
    assert (folder / "kept").exists()


def test_bytes_count_not_characters(near, monkeypatch):
    name = "ä" * (RAY_BYTES - len(str(near)) - 1)
    (near / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(near / name))
    assert len(os.environ["TMPDIR"]) == RAY_BYTES
    shorten_temp_folder(RAY_BYTES)
    assert os.environ["TMPDIR"] != str(near / name)


def test_a_folder_that_is_short_enough_stays(near, monkeypatch, capsys):
    folder = folder_of(near, RAY_BYTES)
    monkeypatch.setenv("TMPDIR", str(folder))
    shorten_temp_folder(RAY_BYTES)
    assert os.environ["TMPDIR"] == str(folder) == tempfile.gettempdir()
    assert capsys.readouterr().out == ""


def test_a_relative_folder_and_an_empty_name(near, monkeypatch):
    (near / "t").mkdir()
    monkeypatch.chdir(near)
    monkeypatch.setenv("TMPDIR", "t")
    monkeypatch.setenv("RAY_TMPDIR", "")
    shorten_temp_folder(RAY_BYTES)
    assert os.environ["TMPDIR"] == str(near / "t")
    assert "RAY_TMPDIR" not in os.environ


def test_a_folder_that_is_missing_or_not_writable_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name in ("file", "missing"):
        monkeypatch.setenv("TMPDIR", str(tmp_path / name))
        with pytest.raises(UserError, match=rf"^TMPDIR: {tmp_path / name} is not a folder; make it so, name another one"):
            shorten_temp_folder(RAY_BYTES)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=rf"^TMPDIR: {tmp_path} is not writable"):
        shorten_temp_folder(RAY_BYTES)


def test_places_that_cannot_be_written_are_passed_over(tmp_path, near, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(folder_of(tmp_path, 150)))
    monkeypatch.setattr(temp_folder, "SHORT", (str(tmp_path / "missing"), str(folder_of(near, 60))))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with pytest.raises(
        UserError, match=r"^TMPDIR: .*\(at most 39 bytes\).*there is no place for a shorter path in .*missing"
    ):
        shorten_temp_folder(RAY_BYTES)
    assert all(not any(path.iterdir()) for path in near.iterdir())
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(near))
    shorten_temp_folder(RAY_BYTES)
    assert os.environ["TMPDIR"].startswith(str(near))


def test_the_short_path_goes_with_its_process_and_not_with_a_fork(tmp_path):
    code = (
        "import os; from searchr1.files.temp_folder import shorten_temp_folder\n"
        "shorten_temp_folder(39); short = os.environ['TMPDIR']\n"
        "import atexit, sys\n"
        "pid = os.fork()\n"
        "if pid == 0: sys.exit(0)\n"
        "os.waitpid(pid, 0); print(os.path.lexists(short), short)"
    )
    env = os.environ | {"TMPDIR": str(folder_of(tmp_path, 150))}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    there, short = run.stdout.splitlines()[-1].split()
    assert there == "True"
    assert not os.path.lexists(short)
