"""Every kind of wrong input ends in a message that names it, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil

import pytest
import torch
from support.bit_flips import flipped, random_flips
from support.models import assert_same_tensors, make_model

from searchr1.checkpoints import locate as output
from searchr1.checkpoints import safetensors as safetensors_file
from searchr1.checkpoints.hf2mg import MegatronOptions, hf2mg
from searchr1.checkpoints.hf_folder import StoredWeights
from searchr1.checkpoints.manifest import new_checkpoint, verify_checkpoint
from searchr1.checkpoints.metadata import read_metadata
from searchr1.checkpoints.to_hf import fsdp2hf, mg2hf
from searchr1.checkpoints.torch_dist import TorchDistFolder, TorchDistWriter
from searchr1.cli import main
from searchr1.errors import UserError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """`hf`, and `run/global_step_5/actor` (Megatron) made from it, with manifest.json."""
    root = tmp_path_factory.mktemp("original")
    make_model("qwen2", True, root / "hf", seed=7)
    with new_checkpoint(root / "run", 5) as folder:
        hf2mg(root / "hf", folder / "actor", MegatronOptions(file_bytes=100_000))
        (folder / "actor/checksums.json").unlink()  # a trainer writes none
    return root


@pytest.fixture
def root(original, tmp_path):
    """A copy to damage; nothing new may be beside it afterwards."""
    shutil.copytree(original, tmp_path / "work")
    yield tmp_path / "work"
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["hf", "run"]


@pytest.fixture
def actor(root):
    """Without manifest.json."""
    (root / "run/global_step_5/manifest.json").unlink()
    return root / "run/global_step_5/actor"


def refused(match, action, *args):
    with pytest.raises(UserError, match=match) as caught:
        action(*args)
    assert "Traceback" not in str(caught.value)


def edit(actor, change):
    metadata = pickle.loads((actor / ".metadata").read_bytes())  # our own file
    change(metadata)
    (actor / ".metadata").write_bytes(pickle.dumps(metadata))


# The checkpoint's files


def test_a_missing_or_truncated_file_is_named_with_a_manifest_and_without(root):
    actor = root / "run/global_step_5/actor"
    file = actor / "__0_2.distcp"
    os.truncate(file, file.stat().st_size - 1)
    refused(r"__0_2\.distcp has \d+ bytes instead of \d+", mg2hf, actor, root / "out")
    (root / "run/global_step_5/manifest.json").unlink()
    refused(r"__0_2\.distcp has \d+ bytes instead of \d+ or more: the checkpoint is damaged", mg2hf, actor, root / "out")
    file.unlink()
    refused(r"__0_2\.distcp is missing", mg2hf, actor, root / "out")


def test_flipped_bits_are_named_before_anything_is_converted(root):
    checkpoint = root / "run/global_step_5"
    for number, (path, bit) in enumerate(random_flips(checkpoint, 200)):
        named = rf"^{re.escape(str(path))} (is damaged|has changed)"
        with flipped(path, bit):
            refused(named, verify_checkpoint, checkpoint)
            if number % 10 == 0 or path.name == "manifest.json":
                refused(named, mg2hf, checkpoint / "actor", root / "out")


def test_overwritten_bytes_are_found(root, actor):
    file = actor / "__0_1.distcp"
    data = bytearray(file.read_bytes())
    data[:4000] = bytes(4000)
    file.write_bytes(data)
    refused(r"__0_1\.distcp is damaged where \S+ should be", mg2hf, actor, root / "out")


def test_one_flipped_bit_of_a_weight_is_found_by_verify(root, actor):
    from searchr1.checkpoints.to_hf import Options

    metadata = read_metadata(actor)
    info = next(info for index, info in metadata.storage_data.items() if index.fqn.startswith("embedding."))
    with (actor / info.relative_path).open("r+b") as file:
        file.seek(info.offset + info.length // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    refused(
        r"distcp is damaged where embedding\S+ should be \(wrong checksum",
        mg2hf,
        actor,
        root / "out",
        None,
        Options(verify=True),
    )


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"nonsense", pickle.dumps({"a": 1})])
def test_damaged_metadata_is_named(root, actor, data):
    (actor / ".metadata").write_bytes(data)
    refused(r"\.metadata is (damaged|not a PyTorch)", mg2hf, actor, root / "out")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


class Sneaky:
    def __reduce__(self):
        return eval, ("1",)


@pytest.mark.parametrize("attack", [Evil(), Sneaky()])
def test_code_in_the_metadata_is_not_run(root, actor, attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit(actor, lambda metadata: setattr(metadata, "planner_data", attack))
    refused(r"\.metadata is damaged.*has no place in a checkpoint", mg2hf, actor, root / "out")
    assert not (tmp_path / "evil").exists()


def test_metadata_that_point_outside_are_rejected(root, actor):
    def outside(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = "../../../hf/model.safetensors"

    edit(actor, outside)
    refused("outside of the checkpoint", mg2hf, actor, root / "out")


def test_a_part_that_no_file_has_is_rejected(root, actor):
    def forget(metadata):
        item = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
        item.chunks = [chunk for chunk in item.chunks if chunk.offsets[0] != 2]

    edit(actor, forget)
    refused(r"linear_fc2\.weight is not whole: 6144 of its elements", mg2hf, actor, root / "out")


def test_what_is_no_checkpoint_is_rejected(root, actor):
    refused("does not exist", mg2hf, root / "nowhere", root / "out")
    refused("is not a checkpoint folder.*it has global_step_5: give one of them", mg2hf, root / "run", root / "out")
    refused(r"is not a checkpoint folder \(no \.metadata\); give a folder that has one of", mg2hf, root / "hf", root / "out")
    (actor / ".metadata").unlink()
    refused(r"has \.distcp files, but no \.metadata", mg2hf, actor, root / "out")


# Its tensors


def test_a_config_of_another_model_is_rejected_by_name(root, actor):
    config = json.loads((root / "hf/config.json").read_text())
    for change, match in (
        ({"num_hidden_layers": 5, "layer_types": None}, r"missing decoder\.layers\.4\."),
        ({"num_hidden_layers": 3, "layer_types": None}, r"unexpected decoder\.layers\.3\."),
        ({"intermediate_size": 32}, r"linear_fc1\.weight is \(192, 64\) instead of \(64, 64\)"),
        ({"vocab_size": 385}, "has 384 rows, but config.json says vocab_size=385"),
        ({"tie_word_embeddings": False}, r"missing output_layer\.weight"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, r"missing \S+q_layernorm\.weight"),
        ({"model_type": "gpt2"}, "has no Megatron mapping|no usable config"),
    ):
        changed = {key: value for key, value in (config | change).items() if value is not None}
        (actor / "hf/config.json").write_text(json.dumps(changed))
        refused(match, mg2hf, actor, root / "out")
    (actor / "hf/config.json").write_text("{")
    refused("no usable config.json", mg2hf, actor, root / "out")
    (actor / "hf/config.json").unlink()
    refused("keeps no hf/config.json; give the base model's folder as --hf-model", mg2hf, actor, root / "out")
    refused(r"--hf-model \S+run: has no config.json", mg2hf, actor, root / "out", root / "run")


def rewrite(source, target, change=lambda name, tensor: tensor, more=()):
    """A copy of a checkpoint, stacked tensors in one chunk, with changes."""
    target.mkdir()
    folder = TorchDistFolder(source)
    writer = TorchDistWriter(target)
    for name in folder.tensors:
        writer.add(name, change(name, folder.read(name)))
    for name in more:
        writer.add(name, torch.zeros(3))
    writer.finish()
    folder.close()
    return target


def test_tensors_that_the_model_does_not_have_are_rejected_and_the_optimizers_ignored(root, actor, tmp_path):
    folder = rewrite(actor, tmp_path / "more", more=["decoder.layers.0.mlp.router.weight"])
    refused(r"unexpected decoder\.layers\.0\.mlp\.router\.weight", mg2hf, folder, root / "out", root / "hf")
    folder = rewrite(actor, tmp_path / "moments", more=["optimizer.state.exp_avg.decoder.layers.x", "chained_0.optimizer.y"])
    mg2hf(folder, tmp_path / "out", root / "hf")


def test_a_larger_padding_is_cut_off_and_a_far_larger_one_rejected(root, actor, tmp_path):
    def pad(rows):
        return lambda name, tensor: torch.cat([tensor, torch.full((rows, 64), 9.0)]) if name.startswith("embed") else tensor

    mg2hf(rewrite(actor, tmp_path / "padded", pad(128)), tmp_path / "out", root / "hf")
    assert_same_tensors(root / "hf", tmp_path / "out")
    far = rewrite(actor, tmp_path / "far", pad(9000))
    refused("has 9384 rows, but config.json says vocab_size=300", mg2hf, far, root / "out", root / "hf")


def test_the_other_kind_of_checkpoint_is_reported_apart(root, actor, tmp_path):
    refused("is a Megatron checkpoint: use searchr1 convert mg2hf", fsdp2hf, actor, root / "out")
    fsdp = tmp_path / "fsdp"
    fsdp.mkdir()
    writer = TorchDistWriter(fsdp)
    with StoredWeights.open(root / "hf") as reader:
        for name in reader.specs:
            writer.add(f"model.{name}", reader.tensor(name))
    writer.finish()
    refused("is an FSDP checkpoint: use searchr1 convert fsdp2hf", mg2hf, fsdp, root / "out", root / "hf")
    shutil.rmtree(fsdp)
    fsdp.mkdir()
    writer = TorchDistWriter(fsdp)
    writer.add("something", torch.zeros(2))
    writer.finish()
    refused("is not a Megatron checkpoint", mg2hf, fsdp, root / "out", root / "hf")
    refused("has no tensors of a model", fsdp2hf, fsdp, root / "out", root / "hf")


# The Hugging Face folder


def test_damaged_hugging_face_folders_are_rejected(root):
    refused("has no config.json; give a local model folder", hf2mg, root / "run", root / "out")
    weights = root / "hf/model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-5])
    refused(r"model\.safetensors is damaged or cut short", hf2mg, root / "hf", root / "out")
    weights.unlink()
    refused("weights must be in safetensors files", hf2mg, root / "hf", root / "out")
    index = root / "hf/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refused(r"model-00001-of-00002\.safetensors is missing", hf2mg, root / "hf", root / "out")
    index.write_text("[]")
    refused(r"index\.json is damaged", hf2mg, root / "hf", root / "out")
    index.unlink()
    with safetensors_file.SafetensorsWriter(weights, [safetensors_file.TensorSpec("a", (1,), torch.float32)]) as writer:
        writer.write("a", torch.zeros(1))
    refused(r"missing model\.embed_tokens\.weight", hf2mg, root / "hf", root / "out")


# The output


@pytest.mark.parametrize("to_megatron", [False, True])
def test_a_full_disk_is_reported_and_leaves_nothing(root, monkeypatch, to_megatron):
    actor = root / "run/global_step_5/actor"

    def convert():
        if to_megatron:
            hf2mg(root / "hf", root / "deep/er/out")
        else:
            mg2hf(actor, root / "deep/er/out")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(r"--output \S+out: cannot write: the disk is full; nothing was left there", convert)
    with monkeypatch.context() as patch:
        patch.setattr(output.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
        refused(r"--output \S+out: needs 0\.0 GiB, but the disk has 0\.0 GiB free", convert)


def test_an_output_in_use_is_rejected_and_untouched(root, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "precious").write_text("x")
    actor = root / "run/global_step_5/actor"
    for action in (mg2hf, fsdp2hf):
        refused("exists and is not empty", action, actor, used)
        refused("exists and is not empty", action, actor, used / "precious")
    refused("exists and is not empty", hf2mg, root / "hf", used)
    assert (used / "precious").read_text() == "x"
    (used / "precious").unlink()
    mg2hf(actor, used)
    assert (used / "config.json").is_file()


def test_what_cannot_be_made_is_reported(root, tmp_path):
    (tmp_path / "file").write_text("")
    refused("cannot write", mg2hf, root / "run/global_step_5/actor", tmp_path / "file/out")


def test_the_command_line_says_what_is_wrong_without_a_traceback(root, capsys):
    assert main(["convert", "mg2hf", "--checkpoint", str(root / "hf"), "--output", str(root / "out")]) == 2
    assert "searchr1 convert: --checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", "mg2hf", "--checkpoint", "x", "--output", "y", "--dtype", "int4"])
    assert "invalid choice: 'int4'" in capsys.readouterr().err
    argv = ["convert", "mg2hf", "--checkpoint", "x", "--output", "y", "--shard-gib", "0"]
    assert main(argv) == 2
    assert "--shard-gib 0.0: must be above 0" in capsys.readouterr().err


class ByGetattr:
    """Pickled as a call of getattr, as early releases of Python 3.11 do with members of enumerations."""

    def __init__(self, owner, name):
        self.call = (getattr, (owner, name))

    def __reduce__(self):
        return self.call


def test_members_of_enumerations_may_be_looked_up_and_nothing_else(root, actor):
    from torch.distributed.checkpoint.planner import WriteItemType

    edit(actor, lambda metadata: setattr(metadata, "planner_data", [ByGetattr(WriteItemType, "SHARD")]))
    mg2hf(actor, root.parent / "out")
    for owner, name in ((torch.Size, "__init__"), ("text", "format"), (WriteItemType, ("a",))):
        edit(actor, lambda metadata, owner=owner, name=name: setattr(metadata, "planner_data", ByGetattr(owner, name)))
        refused("calls getattr, which has no place", mg2hf, actor, root / "out")
