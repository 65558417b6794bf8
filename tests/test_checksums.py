"""Checksums of files: what a changed, shortened or missing one is reported as."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1.files.checksums import BLOCK_BYTES, FileSum, checksum, damaged, files_below, take_all


def test_the_sum_is_the_published_one_of_the_empty_input(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert checksum(tmp_path / "empty") == "99aa06d3014798d86001c324468d497f"  # XXH3-128 of nothing, seed 0


def test_every_byte_counts_once_over_several_blocks(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (BLOCK_BYTES // 128))
    seen: list[int] = []
    before = checksum(path, seen.append)
    assert sum(seen) == path.stat().st_size
    with path.open("r+b") as file:
        file.seek(BLOCK_BYTES)
        file.write(b"\x01")
    assert checksum(path) != before


@settings(max_examples=50, deadline=None)
@given(contents=st.binary(min_size=1, max_size=300), data=st.data())
def test_any_flipped_bit_is_named(tmp_path_factory: pytest.TempPathFactory, contents: bytes, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("sums")
    (folder / "a").mkdir()
    (folder / "a/one").write_bytes(contents)
    (folder / "two").write_bytes(b"untouched")
    sums = take_all(folder)
    assert list(damaged(folder, sums)) == []
    bit = data.draw(st.integers(0, 8 * len(contents) - 1))
    changed = bytearray(contents)
    changed[bit // 8] ^= 1 << bit % 8
    (folder / "a/one").write_bytes(changed)
    assert [damage.path for damage in damaged(folder, sums)] == [folder / "a/one"]
    assert list(damaged(folder, sums, sizes_only=True)) == []


def test_missing_and_shortened_files_are_named_without_reading(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"ab")
    sums = {"short": FileSum(3, "0" * 32), "gone": FileSum(1, "0" * 32)}
    assert [str(damage) for damage in damaged(tmp_path, sums)] == [
        f"{tmp_path / 'short'} has 2 bytes instead of 3",
        f"{tmp_path / 'gone'} is missing",
    ]


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../b", ""])
def test_names_that_lead_out_of_the_folder_are_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leads out"):
        list(damaged(tmp_path, {name: FileSum(0, "")}))


def test_a_size_without_a_sum_is_compared_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"xy")
    assert list(damaged(tmp_path, {"a": FileSum(2, "")})) == []
    assert [path.as_posix() for path in files_below(tmp_path)] == ["a"]
