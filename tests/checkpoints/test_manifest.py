"""A checkpoint's manifest: what is damaged is named before it is read, with an older checkpoint that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.bit_flips import flipped

from searchr1.checkpoints import manifest
from searchr1.checkpoints.manifest import (
    MANIFEST,
    checkpoint_steps,
    latest_checkpoint,
    rank_sums,
    verify_checkpoint,
    verify_source,
    write_manifest,
    write_rank_sums,
)
from searchr1.errors import UserError
from searchr1.files import checksums as sums_file
from searchr1.files.checksums import checksum, take, take_all


def make(root: Path, step: int) -> Path:
    folder = root / f"global_step_{step}"
    for name in ("actor/hf", "critic"):
        (folder / name).mkdir(parents=True)
    (folder / "runner.json").write_text('{"step": 1}')
    (folder / "actor/.metadata").write_bytes(b"metadata")
    (folder / "actor/__0_0.distcp").write_bytes(bytes(range(256)) * step)
    (folder / "actor/hf/config.json").write_text("{}")
    (folder / "critic/__0_0.distcp").write_bytes(b"critic")
    write_manifest(folder, step, {})
    return folder


def without_sums(folder: Path) -> None:
    """As releases before wrote it."""
    sizes = {name: known.bytes for name, known in take_all(folder).items() if name != MANIFEST}
    (folder / MANIFEST).unlink()
    (folder / "sizes.json").write_text(json.dumps(sizes))


def test_the_manifest_names_every_file_with_its_sum(tmp_path: Path) -> None:
    folder = make(tmp_path, 3)
    content = json.loads((folder / MANIFEST).read_text())
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert sorted([*content["files"], MANIFEST]) == files
    assert content["step"] == 3
    assert content["files"]["critic/__0_0.distcp"] == {"bytes": 6, "xxh3": checksum(folder / "critic/__0_0.distcp")}
    verify_checkpoint(folder)
    assert latest_checkpoint(tmp_path) == folder


@pytest.mark.parametrize("name", ["runner.json", "actor/.metadata", "actor/__0_0.distcp", "actor/hf/config.json", MANIFEST])
def test_a_flipped_bit_is_named_with_the_newest_older_checkpoint_that_is_intact(tmp_path: Path, name: str) -> None:
    one, two, three = (make(tmp_path, step) for step in (1, 2, 3))
    with flipped(three / name, 9), pytest.raises(UserError) as caught:
        latest_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{three / name} ")
    assert str(caught.value).endswith(f": the checkpoint is damaged; use runner.resume_dir={two}")
    with flipped(three / name, 9), flipped(two / "critic/__0_0.distcp", 0), pytest.raises(UserError) as caught:
        latest_checkpoint(tmp_path)
    assert str(caught.value).endswith(f"; use runner.resume_dir={one}")
    for folder in (one, two):
        (folder / MANIFEST).write_text("{")
    with flipped(three / name, 9), pytest.raises(UserError) as caught:
        latest_checkpoint(tmp_path)
    assert str(caught.value).endswith("; no older one is intact: get it from a copy, or start again")


def test_checkpoints_from_before_still_load_and_say_what_cannot_be_noticed(tmp_path: Path, capsys) -> None:
    folder = make(tmp_path, 2)
    verify_checkpoint(folder)
    assert capsys.readouterr().out == ""
    without_sums(folder)
    assert checkpoint_steps(tmp_path) == [2]
    with flipped(folder / "actor/__0_0.distcp", 5):
        verify_checkpoint(folder)
    said = capsys.readouterr().out
    assert said == f"{folder}: was written without checksums; sizes are compared, contents cannot be\n"
    (folder / "actor/.metadata").write_bytes(b"short")
    with pytest.raises(UserError, match=r"\.metadata has 5 bytes instead of 8: the checkpoint is damaged"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": "b"}', '{"a": true}', '{"../x": 1}', "[" * 100_000])
def test_a_damaged_table_of_sizes_is_an_error(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path, 2)
    without_sums(folder)
    (folder / "sizes.json").write_text(text)
    with pytest.raises(UserError, match=r"sizes\.json is damaged .*: the checkpoint is damaged; no older one is intact"):
        latest_checkpoint(tmp_path)


def test_a_folder_with_neither_is_no_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path, 2)
    (folder / MANIFEST).unlink()
    assert checkpoint_steps(tmp_path) == []
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match=r"is not a complete checkpoint \(it has no manifest\.json\)"):
        verify_checkpoint(folder)


def test_a_damaged_manifest_is_never_passed_over_for_the_sizes(tmp_path: Path) -> None:
    folder = make(tmp_path, 2)
    (folder / "sizes.json").write_text("{}")
    with flipped(folder / MANIFEST, 100), pytest.raises(UserError, match=r"manifest\.json"):
        verify_checkpoint(folder)


def test_a_checkpoint_of_a_later_release_is_not_called_damaged(tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sums_file, "FORMAT", 2)
        folder = make(tmp_path, 2)
    with pytest.raises(UserError) as caught:
        latest_checkpoint(tmp_path)
    assert str(caught.value) == f"{folder / MANIFEST} has format 2, this searchr1 knows 1; update searchr1"


def test_of_a_renamed_checkpoint_no_older_one_is_named(tmp_path: Path) -> None:
    make(tmp_path, 1)
    best = make(tmp_path, 2).rename(tmp_path / "best")
    verify_checkpoint(best)
    with flipped(best / "runner.json", 3), pytest.raises(UserError, match=r"get it from a copy, or use another one$"):
        verify_checkpoint(best)


def test_files_that_came_later_are_harmless(tmp_path: Path) -> None:
    folder = make(tmp_path, 2)
    (folder / "notes.txt").write_text("mine")
    verify_checkpoint(folder)


def test_a_part_is_verified_alone_and_only_in_a_checkpoint(tmp_path: Path) -> None:
    older, folder = make(tmp_path, 1), make(tmp_path, 2)
    (folder / "critic/__0_0.distcp").unlink()
    verify_source(folder / "actor", "--checkpoint ")
    with flipped(folder / "actor/__0_0.distcp", 3), pytest.raises(UserError) as caught:
        verify_source(folder / "actor", "--checkpoint ")
    assert str(caught.value).endswith(f"; use --checkpoint {older / 'actor'}")
    (tmp_path / "link").symlink_to(folder / "actor")
    with flipped(folder / "actor/__0_0.distcp", 3), pytest.raises(UserError, match="has changed"):
        verify_source(tmp_path / "link", "--checkpoint ")
    # A file of the same name beside somebody else's folder.
    (tmp_path / "elsewhere/actor").mkdir(parents=True)
    (tmp_path / "elsewhere/manifest.json").write_text("{}")
    verify_source(tmp_path / "elsewhere/actor", "--checkpoint ")


def test_sums_that_ranks_took_are_not_taken_again(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "global_step_1"
    for name in ("actor", "critic"):
        (folder / name).mkdir(parents=True)
        for rank in (0, 1, 10):
            (folder / name / f"__{rank}_0.distcp").write_bytes(f"{name} {rank}".encode())
            (folder / name / f"__{rank}_1.distcp").write_bytes(b"more")
        (folder / name / ".metadata").write_bytes(b"m")
    expected = take_all(folder)
    for rank in (0, 1):
        write_rank_sums(folder / "actor", rank)
    (folder / "actor/.sums_1.json").write_text("cut sho")
    known = rank_sums(folder)
    assert sorted(known) == ["actor/__0_0.distcp", "actor/__0_1.distcp"]
    assert not list(folder.rglob(".sums_*"))
    read: list[str] = []
    monkeypatch.setattr(manifest, "take_all", lambda root, names: read.extend(map(str, names)) or take_all(root, names))
    write_manifest(folder, 1, known)
    assert sorted(read) == sorted(name for name in expected if name not in known)
    assert manifest.read_contents(folder).files == expected


def test_a_file_that_changed_after_its_sum_was_taken_is_no_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    known = {"runner.json": take(folder / "runner.json")}
    (folder / "runner.json").write_text("longer than it was")
    with pytest.raises(OSError, match=r"runner\.json has 18 bytes, but 11 were written"):
        write_manifest(folder, 1, known)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / MANIFEST).chmod(0)
    with pytest.raises(UserError, match=r"manifest\.json: not readable"):
        verify_checkpoint(folder)


def test_a_manifest_is_read_without_torch() -> None:
    code = "import sys, searchr1.checkpoints.manifest; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
