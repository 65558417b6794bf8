"""Files and folders that appear complete, or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from searchr1.files.atomic import atomic_file, atomic_folder, partial_path, write_bytes, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_the_block_ends_well_and_kept_otherwise(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, ["one\n", "two\n"])
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as partial:  # noqa: PT012
        partial.write_text("half")
        assert path.read_text() == "one\ntwo\n"
        raise KeyboardInterrupt
    assert path.read_text() == "one\ntwo\n"
    write_bytes(path, b"\0new")
    assert path.read_bytes() == b"\0new"
    assert names(tmp_path) == ["a.txt"]


def test_half_a_surrogate_pair_becomes_the_escape_of_json(tmp_path):
    write_text(tmp_path / "a.json", json.dumps("\ud83d ok é", ensure_ascii=False))
    assert (tmp_path / "a.json").read_bytes() == b'"\\ud83d ok \xc3\xa9"'
    assert json.loads((tmp_path / "a.json").read_text()) == "\ud83d ok é"


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none/a.txt", "x")


def test_a_killed_process_leaves_the_old_file_and_the_old_folder(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    (tmp_path / "b").mkdir()
    write_text(tmp_path / "b/old", "old")
    program = (
        "import os, pathlib, signal, sys\n"
        "from searchr1.files.atomic import atomic_file, atomic_folder\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "with atomic_file(root / 'a.txt') as file, atomic_folder(root / 'b', replace=True) as folder:\n"
        "    file.write_text('new'); (folder / 'new').write_text('new')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path / "b") == ["old"]
    assert sum(name.endswith(".partial") for name in names(tmp_path)) == 2


def test_a_folder_appears_whole_and_a_failed_one_takes_the_parents_that_it_made(tmp_path):
    path = tmp_path / "deep/er/out"
    with pytest.raises(ValueError, match="no"), atomic_folder(path) as partial:  # noqa: PT012
        (partial / "a").write_text("x")
        raise ValueError("no")
    assert names(tmp_path) == []
    partial_path(path).mkdir(parents=True)
    (partial_path(path) / "leftover").touch()  # of a killed process with the same number
    with atomic_folder(path) as partial:
        (partial / "a").write_text("x")
        assert not path.exists()
    assert names(path) == ["a"]
    assert names(path.parent) == ["out"]


def test_a_folder_in_use_is_replaced_only_where_that_is_asked_for(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    with atomic_folder(path) as partial:
        (partial / "first").touch()
    with pytest.raises(OSError, match="not empty"), atomic_folder(path) as partial:
        (partial / "second").touch()
    assert names(path) == ["first"]
    with atomic_folder(path, replace=True, partial_name=".making") as partial:
        assert partial == tmp_path / ".making"
        (partial / "third").touch()
    assert names(path) == ["third"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, durable):
    synced = []

    def fsync(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "out").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_folder(tmp_path / "out", durable=durable, partial_name="part") as partial:
        (partial / "sub").mkdir()
        (partial / "sub/a").write_text("x")
    before = {str(tmp_path / name) for name in ("part", "part/sub", "part/sub/a")}
    expected = {(path, False) for path in before} | {(str(tmp_path), True)}
    assert set(synced) == (expected if durable else set())
