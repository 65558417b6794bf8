"""The safetensors stream against the library, and what it says of damaged files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from searchr1.checkpoints import safetensors as safetensors_file
from searchr1.checkpoints.hf_writer import plan_shards, stream_weights, write_weights
from searchr1.checkpoints.safetensors import DTYPE_NAMES, SafetensorsReader, SafetensorsWriter, TensorSpec, bytes_of
from searchr1.errors import UserError

SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)
NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and not _lone_surrogate(name))


def _lone_surrogate(name):
    return any(0xD800 <= ord(letter) < 0xE000 for letter in name)


def random_tensor(shape, dtype, seed):
    count = torch.Size(shape).numel()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        raw = raw % 2
    return raw.view(dtype).reshape(shape)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(sorted(DTYPE_NAMES, key=str))), max_size=6),
    st.randoms(use_true_random=False),
)
def test_the_library_reads_what_the_stream_wrote_in_any_order_and_the_reader_what_the_library_wrote(layout, random):
    specs = [TensorSpec(name, shape, dtype) for name, (shape, dtype) in layout.items()]
    tensors = {spec.name: random_tensor(spec.shape, spec.dtype, number) for number, spec in enumerate(specs)}
    order = list(tensors)
    random.shuffle(order)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        with SafetensorsWriter(ours, specs) as writer:
            for name in order:
                writer.write(name, tensors[name])
        found = load_file(ours)
        save_file(tensors, theirs)
        assert found.keys() == tensors.keys()
        for path in (ours, theirs):
            reader = SafetensorsReader(path)
            for name, tensor in tensors.items():
                rows = random.randint(0, len(tensor))
                assert torch.equal(bytes_of(found[name]), bytes_of(tensor))
                part = reader.read(name, 0, rows, len(tensor))
                assert part.dtype == tensor.dtype
                assert torch.equal(bytes_of(part), bytes_of(tensor[rows:]))
                if tensor.ndim > 1:
                    columns = random.randint(0, tensor.shape[1])
                    part = reader.read(name, 1, columns, tensor.shape[1])
                    assert torch.equal(bytes_of(part), bytes_of(tensor[:, columns:].contiguous()))
            reader.close()
        with safe_open(ours, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_columns_are_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_PIECE_BYTES", 64)
    tensor = torch.randn(37, 5, 2)
    save_file({"a": tensor}, tmp_path / "x")
    reader = SafetensorsReader(tmp_path / "x")
    assert torch.equal(reader.read("a", 1, 1, 4), tensor[:, 1:4])
    assert torch.equal(reader.read("a", 2, 1, 2), tensor[..., 1:])
    assert torch.equal(reader.read("a", 1, 0, 5), tensor)
    reader.close()


def test_precision_is_changed_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_PIECE_BYTES", 64)
    tensor = torch.randn(37, 5)
    with SafetensorsWriter(tmp_path / "x", [TensorSpec("a", (37, 5), torch.bfloat16)]) as writer:
        writer.write("a", tensor)
    assert torch.equal(load_file(tmp_path / "x")["a"], tensor.bfloat16())


def test_values_beyond_fp16_are_rejected(tmp_path):
    tensor = torch.tensor([1.0, float("inf"), 7e4])
    spec = TensorSpec("layer.weight", (3,), torch.float16)
    with pytest.raises(UserError, match=r"layer\.weight has values beyond fp16.*--dtype bf16"):
        with SafetensorsWriter(tmp_path / "x", [spec]) as writer:
            writer.write("layer.weight", tensor)
    with SafetensorsWriter(tmp_path / "x", [spec]) as writer:
        writer.write("layer.weight", tensor.clamp(max=65504))


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_a_file_cut_short_is_named(tmp_path, cut):
    save_file({"a": torch.zeros(10)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:cut])
    with pytest.raises(UserError, match=r"x\.safetensors is damaged or cut short"):
        SafetensorsReader(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode(),
        json.dumps({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}).encode(),
        json.dumps({"a": {"shape": [1], "data_offsets": [0, 4]}}).encode(),
        json.dumps({"a": 3}).encode(),
    ],
)
def test_a_wrong_header_is_rejected(tmp_path, header):
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="x is damaged"):
        SafetensorsReader(tmp_path / "x")


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 100))
def test_shards_keep_the_order_and_the_size(sizes, limit):
    specs = [TensorSpec(str(number), (size,), torch.uint8) for number, size in enumerate(sizes)]
    shards = plan_shards(specs, limit)
    assert [spec for shard in shards for spec in shard] == specs
    for shard in shards:
        assert shard
        assert len(shard) == 1 or sum(spec.nbytes for spec in shard) <= limit


@pytest.mark.parametrize("shard_bytes", [1 << 20, 100])
def test_both_writers_make_the_same_folder(tmp_path, shard_bytes):
    tensors = {f"layer.{number}": torch.randn(number + 1, 4) for number in range(7)}
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    for name in ("streamed", "grouped"):
        (tmp_path / name).mkdir()
    stream_weights(specs, tensors.items(), tmp_path / "streamed", shard_bytes)
    assert write_weights(iter(tensors.items()), tmp_path / "grouped", shard_bytes) == 7
    files = sorted(path.name for path in (tmp_path / "streamed").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "grouped").iterdir())
    assert all((tmp_path / "streamed" / name).read_bytes() == (tmp_path / "grouped" / name).read_bytes() for name in files)
    if shard_bytes == 100:
        index = json.loads((tmp_path / "streamed/model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert set(index["weight_map"].values()) == {name for name in files if name.endswith(".safetensors")}
