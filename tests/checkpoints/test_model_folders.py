"""A model's folder from a stranger: headers that lie, pointers, pickles and settings are refused by every command."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.payloads import RUN, archive, tensor_pickle

from searchr1.checkpoints.model_folder import check_files
from searchr1.checkpoints.safetensors_header import read_header
from searchr1.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
ROOT = Path(__file__).resolve().parents[2]


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_of(header: bytes | dict, data: int = 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


LIES = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "a header longer than the file": file_of({"a": tensor()}, length=1 << 40),
    "a header of 2**64 - 1 bytes": file_of({"a": tensor()}, length=(1 << 64) - 1),
    "no header": file_of(b"", 8),
    "a list": file_of(b"[]", 0),
    "a number": file_of(b"1" * 5000, 0),
    "nested deeply": file_of(b'{"a":' * 100_000, 0),
    "nested lists": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0),
    "not UTF-8": file_of(b'{"\xff": 1}', 0),
    "UTF-16": file_of(json.dumps({"a": tensor()}).encode("utf-16"), 8),
    "NaN": file_of(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'),
    "a name twice": file_of(b'{"a": %b, "a": %b}' % ((json.dumps(tensor()).encode(),) * 2)),
    "places beyond the file": file_of({"a": tensor(shape=(1 << 40,), offsets=(0, 4 << 40))}),
    "a place before the file": file_of({"a": tensor(offsets=(-8, 0))}),
    "places that overlap": file_of({"a": tensor(), "b": tensor()}),
    "places that overlap by half": file_of({"a": tensor(), "b": tensor(offsets=(4, 12))}, 12),
    "a hole": file_of({"a": tensor(), "b": tensor(offsets=(12, 20))}, 20),
    "bytes after the last": file_of({"a": tensor()}, 9),
    "a place turned round": file_of({"a": tensor(offsets=(8, 0))}),
    "another shape": file_of({"a": tensor(shape=(3,))}),
    "another dtype": file_of({"a": tensor("F64")}),
    "a dtype that is none": file_of({"a": tensor("F99")}),
    "a dtype that is a list": file_of({"a": tensor(["F32"])}),
    "a negative shape": file_of({"a": tensor(shape=(-2, -1))}),
    "a shape that overflows": file_of({"a": tensor(shape=(1 << 63, 2))}),
    "a shape of a fraction": file_of({"a": tensor(shape=(2.0,))}),
    "a shape of truth": file_of({"a": tensor(shape=(True, 2))}),
    "a shape that is text": file_of({"a": {**tensor(), "shape": "2"}}),
    "a thousand dimensions": file_of({"a": tensor(shape=(1,) * 1000 + (2,))}),
    "three places": file_of({"a": tensor(offsets=(0, 4, 8))}),
    "no shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "notes that are numbers": file_of({"__metadata__": {"a": 1}, "a": tensor()}),
    "notes that are a list": file_of({"__metadata__": [], "a": tensor()}),
}


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie_are_rejected(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[name])
    for read in (read_header, lambda path: check_files(path.parent)):
        with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut short") as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", LIES)
def test_the_library_does_not_read_them_either(name, tmp_path):
    """So nothing is refused here that it would have read."""
    from safetensors import SafetensorError, safe_open

    if name in ("a name twice", "a thousand dimensions"):
        pytest.skip("the library takes the last one, or any number")
    (tmp_path / "x").write_bytes(LIES[name])
    with pytest.raises((SafetensorError, OSError, OverflowError)):
        safe_open(tmp_path / "x", "pt")


def test_a_giant_header_is_rejected_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((40 << 20).to_bytes(8, "little"))
    os.truncate(path, 41 << 20)
    with pytest.raises(UserError, match="its header has 41943040 bytes, more than"):
        read_header(path)


@pytest.mark.parametrize(
    "tensors", [{}, {"a": torch.zeros(0)}, {"a": torch.ones(3, 2), "b": torch.zeros((), dtype=torch.int8)}]
)
def test_what_the_library_writes_is_read(tensors, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert {name: item.shape for name, item in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}


# Folders


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "vocab.txt", "1_Pooling/config.json"]
)
def test_pointers_of_git_lfs_are_rejected(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer, not the file; run git lfs pull"):
        check_files(folder)


def test_settings_nested_too_deeply_and_too_long_are_rejected(folder):
    (folder / "generation_config.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match=r"generation_config\.json: is nested too deeply"):
        check_files(folder)
    os.truncate(folder / "generation_config.json", 65 << 20)
    with pytest.raises(UserError, match=r"generation_config\.json: has 68157440 bytes, more than"):
        check_files(folder)


def test_settings_with_long_lines_are_no_attack(folder):
    (folder / "generation_config.json").write_text(json.dumps({"a": "x" * (10 << 20)}))
    (folder / "tokenizer.json").write_text("{" + " " * (65 << 20) + "}")
    check_files(folder)


def test_adapters_beside_a_model_are_rejected(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(UserError, match=r"LoRA adapters .* beside a model, and libraries differ"):
        check_files(folder)


def test_pickles_are_looked_at_where_they_would_be_read(folder, tmp_path):
    payload = archive(RUN["stack global, protocol 4"](tmp_path / "ran"))
    for place in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "2_Dense/pytorch_model.bin"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(payload)
        with pytest.raises(UserError, match=r"pytorch_model\S*\.bin is damaged, cut short or holds more than tensors"):
            check_files(folder)
        (folder / place).unlink()
    packed = archive(tensor_pickle(1 << 20, 1 << 20), {"data/0": bytes(4 << 20)}, zipfile.ZIP_DEFLATED)
    (folder / "pytorch_model.bin").write_bytes(packed)
    with pytest.raises(UserError, match="packed"):
        check_files(folder)
    assert not (tmp_path / "ran").exists()


def test_links_are_followed_and_pipes_and_circles_are_not(folder, tmp_path):
    (tmp_path / "blob").write_text(POINTER)
    (folder / "tokenizer.json").symlink_to(tmp_path / "blob")
    with pytest.raises(UserError, match=r"tokenizer\.json: is a Git LFS pointer"):
        check_files(folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "model.safetensors")
    (folder / "circle").symlink_to(folder)
    (folder / "itself.json").symlink_to("itself.json")
    check_files(folder)
    with pytest.raises(UserError, match="is missing"):
        read_header(folder / "model.safetensors")


def test_names_on_the_hub_are_no_folders():
    check_files("Qwen/Qwen2.5-3B-Instruct")


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../x.safetensors", "a/b.safetensors", "", ".", "x\0.safetensors", 3, None]
)
def test_an_index_that_leads_out_of_the_folder_is_rejected(folder, target):
    from searchr1.checkpoints.hf_folder import weight_files

    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": target}}))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json (names|is damaged)"):
        weight_files(folder)


# Commands


@pytest.fixture
def pointers(tmp_path):
    """The demo's model as a clone without Git LFS leaves it."""
    source = ROOT / "examples/demo/cold_start"
    (tmp_path / "clone").mkdir()
    for path in source.iterdir():
        text = path.suffix == ".json" and path.name != "tokenizer.json"
        (tmp_path / "clone" / path.name).write_bytes(path.read_bytes() if text else POINTER.encode())
    return str(tmp_path / "clone")


def test_commands_name_the_pointer(pointers, tmp_path, monkeypatch, capsys):
    from searchr1.cli import main
    from searchr1.training import sft

    monkeypatch.setattr(sft, "init_process_group", lambda device: None)
    monkeypatch.setattr(sft.dist, "get_rank", lambda: 0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    for arguments in (
        ["infer", "--model_path", pointers, "--no-search", "--prompt", "x"],
        ["sft", "--model", pointers, "--data", str(rows), "--output", str(tmp_path / "out")],
        ["convert", "hf2mg", "--hf-model", pointers, "--output", str(tmp_path / "mg")],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "is a Git LFS pointer, not the file; run git lfs pull" in error
        assert "Traceback" not in error


def test_servers_of_encoders_and_rerankers_name_it_too(pointers):
    from searchr1.retrieval.encode.encoder import Encoder
    from searchr1.retrieval.rerank.reranker import CrossEncoder

    with pytest.raises(UserError, match=r"--retriever_model .* is a Git LFS pointer"):
        Encoder("e5", pointers)
    with pytest.raises(UserError, match=r"--reranker_model .* is a Git LFS pointer"):
        CrossEncoder(pointers)
