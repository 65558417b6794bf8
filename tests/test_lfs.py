"""Git LFS pointers are recognised by their text, whatever the file is called."""

from __future__ import annotations

import pytest

from searchr1.errors import UserError
from searchr1.files.lfs import is_pointer, reject_pointer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "__0_0.distcp", "e5_Flat.index"])
def test_a_pointer_is_rejected_by_name(tmp_path, name):
    path = tmp_path / name
    path.write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer, not the file; run git lfs pull"):
        reject_pointer(path)


@pytest.mark.parametrize(
    "text", ["", "version 1", "# version https://git-lfs.github.com/spec/v1", POINTER + "x" * 1024, '{"version": "1.0"}']
)
def test_other_files_are_no_pointers(tmp_path, text):
    (tmp_path / "file").write_text(text)
    assert not is_pointer(tmp_path / "file")
    reject_pointer(tmp_path / "file")


def test_what_is_missing_or_a_folder_is_left_to_its_reader(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        assert not is_pointer(path)
        reject_pointer(path)
