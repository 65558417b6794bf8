"""Resuming from a stranger's checkpoint: whatever file of it is crafted, nothing is run and one sentence is said."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support.payloads import RUN, archive, saved
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from searchr1.checkpoints.manifest import new_checkpoint
from searchr1.checkpoints.metadata import read_metadata
from searchr1.errors import UserError
from searchr1.learner.checkpoint import load_state, save_state

SHAPES = ("stack global, protocol 4", "getattr of a module", "instance", "a pickle in a pickle")
"""Payloads that stand for the others where reading a file takes long; every shape is tried in test_strangers_files.py."""


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    if dist.is_initialized():  # by another file's tests
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of ours, with the model whose configuration it keeps."""
    root = tmp_path_factory.mktemp("whole")
    model = Path(__file__).resolve().parents[2] / "examples/demo/cold_start"
    with new_checkpoint(root, 1) as folder:
        save_state(folder / "actor", *make(), str(model))
    return root / "global_step_1"


@pytest.fixture
def checkpoint(whole, tmp_path):
    """A copy of it, without sums: whoever crafts a file crafts those too."""
    shutil.copytree(whole, tmp_path / "global_step_1")
    for name in ("manifest.json", "sizes.json"):
        path = tmp_path / "global_step_1" / name
        if path.is_file():
            found = json.loads(path.read_text())
            path.write_text(json.dumps(found | {"files": {}} if "files" in found else {}))
    return tmp_path / "global_step_1/actor"


@pytest.fixture
def marker(tmp_path):
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def refused(match, folder):
    with pytest.raises(UserError, match=match) as caught:
        load_state(folder, *make())
    assert "\n" not in str(caught.value)


def replace(folder: Path, kind: type, content: bytes) -> None:
    """Put other bytes where the first object, or the first tensor, of a checkpoint is."""
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())  # our own
    name = next(name for name, item in metadata.state_dict_metadata.items() if isinstance(item, kind))
    index = next(index for index in metadata.storage_data if index.fqn == name)
    info = metadata.storage_data[index]
    file = folder / info.relative_path
    info.offset, info.length = file.stat().st_size, len(content)
    with file.open("ab") as opened:
        opened.write(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_an_honest_checkpoint_is_resumed(checkpoint):
    model, optimizer, schedule = make()
    for parameter in model.parameters():
        parameter.data.zero_()
    load_state(checkpoint, model, optimizer, schedule)
    expected = make()
    for ours, theirs in zip(model.parameters(), expected[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(optimizer.state.values(), expected[1].state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("shape", RUN)
def test_metadata_run_nothing(checkpoint, marker, shape):
    (checkpoint / ".metadata").write_bytes(RUN[shape](marker))
    refused(r"\.metadata is (damaged|not a PyTorch)", checkpoint)


@pytest.mark.parametrize("shape", RUN)
def test_objects_run_nothing(checkpoint, marker, shape):
    replace(checkpoint, BytesStorageMetadata, archive(RUN[shape](marker)))
    refused(r"\.distcp is damaged where \S+ should be", checkpoint)


@pytest.mark.parametrize("shape", SHAPES)
def test_other_places_run_nothing(checkpoint, marker, shape):
    replace(checkpoint, TensorStorageMetadata, archive(RUN[shape](marker)) + bytes(100))
    refused(r"\.distcp is damaged where \S+ should be|\.metadata is damaged", checkpoint)
    (checkpoint / "extra.pt").write_bytes(archive(RUN[shape](marker)))
    refused("damaged", checkpoint)


def test_a_plain_pickle_in_place_of_an_object_runs_nothing(checkpoint, marker):
    replace(checkpoint, BytesStorageMetadata, RUN["global, protocol 0"](marker))
    refused(r"\.distcp is damaged where \S+ should be \(it is not an archive of torch\.save\)", checkpoint)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "holds no dictionary"),
        ({}, r"extra\.pt is damaged"),
        ({"schedule": {"last_epoch": "x"}, "rng": {}}, r"extra\.pt is damaged"),
        ({"schedule": {"last_epoch": 1}, "rng": {"torch": torch.zeros(3), "numpy": 1}}, r"extra\.pt is damaged"),
    ],
)
def test_extras_that_are_none_are_one_sentence(checkpoint, extra, message):
    (checkpoint / "extra.pt").write_bytes(saved(extra))
    refused(message, checkpoint)


def crafted(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # our own
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def first(metadata, kind=TensorStorageMetadata):
    return next((name, item) for name, item in metadata.state_dict_metadata.items() if isinstance(item, kind))


def infos(metadata):
    return list(metadata.storage_data.values())


LIES = {
    "a file outside": (lambda m: setattr(infos(m)[0], "relative_path", "../../secret"), "outside of the checkpoint"),
    "an absolute file": (lambda m: setattr(infos(m)[0], "relative_path", "/etc/passwd"), "outside of the checkpoint"),
    "a negative place": (lambda m: setattr(infos(m)[0], "offset", -1), "whose offset is none"),
    "a place beyond the file": (lambda m: setattr(infos(m)[0], "offset", 1 << 40), r"instead of \d+ or more"),
    "a text as a length": (lambda m: setattr(infos(m)[0], "length", "1"), "whose length is none"),
    "packed": (lambda m: setattr(infos(m)[0], "transform_descriptors", ["stream.zstd"]), "packed in an unknown way"),
    "parts beyond the tensor": (
        lambda m: setattr(first(m)[1].chunks[0], "sizes", torch.Size([1 << 40, 4])), "a part outside of it"
    ),
    "more elements than bytes": (
        lambda m: (
            setattr(first(m)[1], "size", torch.Size([1 << 40])),
            setattr(first(m)[1].chunks[0], "sizes", torch.Size([1 << 40])),
            setattr(first(m)[1].chunks[0], "offsets", torch.Size([0])),
            m.storage_data.update({type(next(iter(m.storage_data)))(first(m)[0], (0,)): infos(m)[0]}),
        ),
        "more elements than there are bytes",
    ),
    "the same bytes twice": (
        lambda m: [vars(info).update(relative_path=infos(m)[0].relative_path, offset=0, length=3000) for info in infos(m)],
        "are in the same place",
    ),
    "no dictionary": (lambda m: setattr(m, "state_dict_metadata", []), "whose state_dict_metadata is none"),
    "a number as a tensor": (lambda m: m.state_dict_metadata.update(x=3), "neither a tensor nor an object"),
    "a list of parts": (lambda m: setattr(first(m)[1], "chunks", [1]), "parts of another shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_metadata_that_lie_are_rejected_before_anything_is_read(checkpoint, name):
    change, message = LIES[name]
    crafted(checkpoint, change)
    with pytest.raises(UserError, match=message):
        read_metadata(checkpoint)
    refused(message, checkpoint)


def test_links_are_read_through_and_pipes_are_not(checkpoint, tmp_path):
    file = next(checkpoint.glob("*.distcp"))
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    load_state(checkpoint, *make())
    file.unlink()
    file.symlink_to("/dev/zero")
    refused("is missing", checkpoint)
    file.unlink()
    file.symlink_to(file.name)  # a link to itself
    refused("is missing", checkpoint)


# Megatron


def test_no_file_of_a_megatron_checkpoint_runs_anything(tmp_path, marker):
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    from searchr1.checkpoints.distributed import load_megatron
    from searchr1.checkpoints.torch_dist import TorchDistWriter

    def state() -> dict:
        w = ShardedTensor.from_rank_offsets("w", torch.zeros(4, 3))
        return {"w": w, "o": ShardedObject("o._extra_state", None, (1,), (0,))}

    folder = tmp_path / "whole"
    folder.mkdir()
    writer = TorchDistWriter(folder)
    writer.add("w", torch.full((4, 3), 3.0))
    writer.add_empty_object("o")
    writer.finish()
    (folder / "common.pt").write_bytes(saved({"updates": 7, "betas": (0.9, 0.99)}))
    replace(folder, BytesStorageMetadata, saved([{"a": 1, "b": [2, (3.5, "x")], "t": torch.ones(2)}]))
    found = load_megatron(state(), folder)
    assert found["w"].eq(3).all()
    assert (found["updates"], found["betas"]) == (7, (0.9, 0.99))
    assert (found["o"]["b"], found["o"]["t"].tolist()) == ([2, (3.5, "x")], [1, 1])

    def damaged(change) -> Path:
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, copy)
        change(copy)
        return copy

    for shape in SHAPES:
        data = RUN[shape](marker)
        for change, message in (
            (lambda copy, data=data: (copy / ".metadata").write_bytes(data), r"\.metadata is"),
            (lambda copy, data=data: (copy / "common.pt").write_bytes(data), r"common\.pt is damaged"),
            (lambda copy, data=data: (copy / "common.pt").write_bytes(archive(data)), r"common\.pt "),
            (
                lambda copy, data=data: replace(copy, BytesStorageMetadata, archive(data)),
                r"distcp is damaged where o\._extra",
            ),
            (lambda copy, data=data: replace(copy, BytesStorageMetadata, data), r"distcp is damaged where o\._extra"),
            (lambda copy, data=data: replace(copy, TensorStorageMetadata, archive(data) + bytes(99)), r"distcp is damaged"),
        ):
            with pytest.raises(UserError, match=message):
                load_megatron(state(), damaged(change))
    other = damaged(lambda copy: replace(copy, BytesStorageMetadata, saved({"a": 1, "b": 2})))
    with pytest.raises(UserError, match="is damaged, or another release of Megatron wrote it"):
        load_megatron(state(), other)
    for text, message in (
        ("[" * 100_000, r"metadata\.json is damaged"),
        ('{"sharded_backend": "zarr", "common_backend": "torch"}', "only torch_dist is read"),
        ("[]", r"metadata\.json is damaged"),
    ):
        with pytest.raises(UserError, match=message):
            load_megatron(state(), damaged(lambda copy, text=text: (copy / "metadata.json").write_text(text)))


def test_megatrons_names_are_its_own_again_after_loading(tmp_path):
    from megatron.core.dist_checkpointing.strategies import torch as strategy

    from searchr1.checkpoints.distributed import load_megatron

    before = strategy._get_filesystem_reader, strategy.MCoreLoadPlanner
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "common_backend": "torch"}')
    with pytest.raises(UserError, match=r"common\.pt is missing"):
        load_megatron({}, tmp_path)
    assert (strategy._get_filesystem_reader, strategy.MCoreLoadPlanner) == before


def test_weights_to_start_from_name_their_key(tmp_path):
    from searchr1.learner.megatron.checkpoint import load_weights

    module = SimpleNamespace(sharded_state_dict=lambda metadata: {})
    with pytest.raises(UserError, match=r"actor\.model\.megatron_checkpoint: .*metadata\.json is damaged"):
        load_weights(module, tmp_path)
