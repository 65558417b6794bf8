"""Checkpoints as other trainers save them: given as they are, converted bit by bit, and hostile ones refused."""

from __future__ import annotations

import os
import shutil
import zipfile

import pytest
import torch
import torch.distributed as dist
from support.foreign_folders import Layout, save_torch_format
from support.models import DTYPES, assert_same_tensors, make_model, tensors_of

from searchr1.checkpoints.hf2mg import hf2mg
from searchr1.checkpoints.to_hf import Options, fsdp2hf, mg2hf
from searchr1.cli import main
from searchr1.errors import UserError

LATEST = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family, tied in (("qwen2", True), ("qwen2", False), ("qwen3", False), ("llama", True)):
        make_model(family, tied, root / f"{family}-{tied}", seed=7, dtype=DTYPES["bf16" if tied else "fp32"])
    return root


def refused(message, action, *args):
    with pytest.raises(UserError, match=message):
        action(*args)


# Megatron's `torch` format


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen2-True", Layout()),
        ("qwen2-True", Layout(1, 4)),
        ("qwen2-True", Layout(2, 2, virtual=2)),
        ("qwen2-False", Layout(2, 1, engine_names=False)),
        ("qwen3-False", Layout(1, 2, virtual=2, engine_names=False)),
        ("qwen3-False", Layout(2, 2)),
        ("llama-True", Layout(2, 4)),
    ],
)
def test_the_torch_format_in_every_layout(models, tmp_path, name, layout):
    save_torch_format(models / name, tmp_path / "saved", layout)
    lines = mg2hf(tmp_path / "saved", tmp_path / "out", models / name, Options(verify=True))
    assert_same_tensors(models / name, tmp_path / "out")
    assert any("identical bit by bit" in line for line in lines)
    assert any("logits of" in line for line in lines)


def test_what_other_libraries_let_torch_load_make_changes_nothing(models, tmp_path):
    from megatron.core.safe_globals import register_safe_globals

    before = torch.serialization.get_safe_globals()
    register_safe_globals()  # NumPy's own functions among others, as in a process that trains with Megatron
    known = set(torch.serialization.get_safe_globals())
    try:
        save_torch_format(models / "qwen2-False", tmp_path / "saved", Layout())
        mg2hf(tmp_path / "saved", tmp_path / "out", models / "qwen2-False", Options())
        assert set(torch.serialization.get_safe_globals()) == known
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    assert_same_tensors(models / "qwen2-False", tmp_path / "out")


@pytest.mark.parametrize("given", ["..", ".", "iter_0000007", "iter_0000007/mp_rank_00", LATEST])
def test_whatever_folder_of_it_is_given(models, tmp_path, given):
    """RLinf's `global_step_N/actor/iter_…` from the step, the actor, the iteration, or a rank."""
    actor = tmp_path / "run/checkpoints/global_step_7/actor"
    save_torch_format(models / "qwen2-True", actor, Layout(2, 1))
    argv = [
        "--checkpoint",
        str(actor.parent if given == ".." else actor / given),
        "--output",
        str(tmp_path / "out"),
        "--hf-model",
        str(models / "qwen2-True"),
    ]
    assert main(["convert", "mg2hf", *argv]) == 0
    assert_same_tensors(models / "qwen2-True", tmp_path / "out")


def test_release_and_what_is_unclear(models, tmp_path):
    saved, hf = save_torch_format(models / "qwen2-True", tmp_path / "saved", Layout()), models / "qwen2-True"
    (saved / "iter_0000007").rename(saved / "release")
    refused("says 7, but there is no iter_0000007", mg2hf, saved, tmp_path / "out", hf)
    (saved / LATEST).write_text("release")
    mg2hf(saved, tmp_path / "out", hf)
    assert_same_tensors(hf, tmp_path / "out")
    (saved / LATEST).write_text("../../etc")
    refused(r"says '\.\./\.\./etc' instead of an iteration", mg2hf, saved, tmp_path / "out2", hf)
    (saved / LATEST).unlink()
    refused("is not a checkpoint folder.*it has release: give one of them", mg2hf, saved, tmp_path / "out2", hf)
    shutil.copytree(saved / "release", saved / "iter_0000001")
    shutil.copytree(saved / "release", saved / "iter_0000002")
    refused("to choose from iter_0000001, iter_0000002; give one", mg2hf, saved, tmp_path / "out2", hf)


def test_a_folder_is_never_reported_to_be_itself(tmp_path):
    actor = tmp_path / "global_step_5/actor"
    actor.mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        mg2hf(actor, tmp_path / "out")
    assert "global_step_N/actor" not in str(caught.value)
    assert "mp_rank_*" in str(caught.value)


def test_ranks_that_are_missing_or_do_not_fit_are_named(models, tmp_path):
    hf = models / "qwen2-False"
    saved = save_torch_format(hf, tmp_path / "saved", Layout(2, 2))
    rank = saved / "iter_0000007/mp_rank_01_000"
    file = rank / "model_optim_rng.pt"
    whole = file.read_bytes()
    os.truncate(file, 4000)
    refused(r"mp_rank_01_000/model_optim_rng\.pt is damaged, cut short", mg2hf, saved, tmp_path / "out", hf)
    data = bytearray(whole)
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused("is damaged", mg2hf, saved, tmp_path / "out", hf, Options(verify=True))
    file.unlink()
    refused(r"mp_rank_01_000: has none of model_optim_rng\.pt", mg2hf, saved, tmp_path / "out", hf)
    rank.rmdir()
    refused(r"mp_rank_01_000 is missing", mg2hf, saved, tmp_path / "out", hf)
    old = save_torch_format(hf, tmp_path / "old", Layout(), checkpoint_version=1.0)
    refused("checkpoint_version 1.0 has queries, keys and values in another order", mg2hf, old, tmp_path / "out", hf)
    refused("tied model; give its base model's folder", mg2hf,
            save_torch_format(models / "qwen2-True", tmp_path / "tied", Layout()), tmp_path / "out", hf)  # fmt: skip
    refused("tie_word_embeddings: true, but output_layer.weight differs", mg2hf,
            save_torch_format(hf, tmp_path / "untied", Layout()), tmp_path / "out", models / "qwen2-True")  # fmt: skip
    refused("is a Megatron checkpoint: use searchr1 convert mg2hf", fsdp2hf, old, tmp_path / "out", hf)


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("attack", "named"),
    [(Evil(os.system, "touch evil"), "posix.system"), (Evil(eval, "open('evil', 'w')"), "builtins.eval"),
     (Evil(shutil.rmtree, "x"), "shutil.rmtree")],
)  # fmt: skip
def test_code_in_a_ranks_file_is_not_run(models, tmp_path, monkeypatch, attack, named):
    monkeypatch.chdir(tmp_path)
    saved = save_torch_format(models / "qwen2-True", tmp_path / "saved", Layout(), opt_param_scheduler=attack)
    refused(f"names {named}, which has no place", mg2hf, saved, tmp_path / "out", models / "qwen2-True")
    ranks = tmp_path / "actor"
    ranks.mkdir()
    torch.save(tensors_of(models / "qwen2-True") | {"x": attack}, ranks / "model_world_size_1_rank_0.pt")
    refused(f"names {named}, which has no place", fsdp2hf, ranks, tmp_path / "out", models / "qwen2-True")
    assert not (tmp_path / "evil").exists()


def test_the_zarr_format_is_named(tmp_path):
    array = tmp_path / "iter_0000007/decoder.layers.mlp.linear_fc1.weight"
    array.mkdir(parents=True)
    (array / ".zarray").write_text("{}")
    refused("is in Megatron's zarr format", mg2hf, tmp_path, tmp_path / "out")


# slime and verl on Megatron: distributed checkpoints in other places


def test_slimes_save_folder(models, tmp_path):
    hf = models / "qwen3-False"
    saved = tmp_path / "saved"
    hf2mg(hf, saved / "iter_0000100")
    shutil.rmtree(saved / "iter_0000100/hf")
    hf2mg(models / "qwen2-False", saved / "iter_0000050")
    (saved / "rollout").mkdir()
    (saved / LATEST).write_text("100")
    mg2hf(saved, tmp_path / "out", hf)
    assert_same_tensors(hf, tmp_path / "out")


@pytest.mark.parametrize("given", [".", "global_step_9", "global_step_9/actor", "global_step_9/actor/dist_ckpt"])
def test_verls_megatron_checkpoint_with_its_own_configuration(models, tmp_path, given):
    hf, root = models / "qwen2-True", tmp_path / "run"
    actor = root / "global_step_9/actor"
    hf2mg(hf, actor / "dist_ckpt")
    shutil.move(actor / "dist_ckpt/hf", actor / "huggingface")
    (root / LATEST).write_text("9")
    mg2hf(root / given, tmp_path / "out")
    assert_same_tensors(hf, tmp_path / "out")


def test_a_checkpoint_that_is_a_model_already(models, tmp_path):
    shutil.copytree(models / "qwen2-True", tmp_path / "global_step_9/actor/huggingface")
    refused("has a Hugging Face model already, which needs no conversion: .*actor/huggingface", mg2hf,
            tmp_path / "global_step_9", tmp_path / "out")  # fmt: skip


# FSDP of verl and RLinf


@pytest.fixture(scope="module")
def mesh():
    """Ranks of a device mesh in one process: only what sharded tensors store is wanted."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=6)
    yield
    if started:
        dist.destroy_process_group()


def sharded(whole: torch.Tensor, rank: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Rank's part of a tensor that FSDP2 (or HSDP, of two dimensions) cut by rows."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    names = ("fsdp",) if len(shape) == 1 else ("ddp", "fsdp")
    device = DeviceMesh("cpu", torch.arange(int(torch.Size(shape).numel())).view(shape), mesh_dim_names=names)
    parts = whole.chunk(shape[-1])
    index = rank % shape[-1]
    local = parts[index].clone() if index < len(parts) else whole[:0].clone()
    places = [Replicate()] * (len(shape) - 1) + [Shard(0)]
    return DTensor.from_local(local, device, places, run_check=False, shape=whole.shape, stride=whole.stride())


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3)])
@pytest.mark.parametrize("name", ["qwen2-True", "qwen3-False"])
def test_verls_fsdp_shards(models, tmp_path, mesh, shape, name):
    hf, actor = models / name, tmp_path / "global_step_9/actor"
    weights = tensors_of(hf)
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # tied: saved under both names
    shutil.copytree(hf, actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    world = int(torch.Size(shape).numel())
    for rank in range(world):
        state = {key: sharded(tensor, rank, shape) for key, tensor in weights.items()}
        torch.save(state, actor / f"model_world_size_{world}_rank_{rank}.pt")
        torch.save({"rng": 1}, actor / f"extra_state_world_size_{world}_rank_{rank}.pt")
    lines = fsdp2hf(tmp_path / "global_step_9", tmp_path / "out", options=Options(verify=True))
    assert any("identical bit by bit" in line for line in lines)
    assert_same_tensors(hf, tmp_path / "out")
    refused("is an FSDP checkpoint: use searchr1 convert fsdp2hf", mg2hf, actor, tmp_path / "out2")
    if world > 1:
        (actor / f"model_world_size_{world}_rank_1.pt").unlink()
        refused(rf"model_world_size_{world}_rank_1\.pt is missing", fsdp2hf, actor, tmp_path / "out2")


def test_names_that_earlier_releases_of_pytorch_gave_their_classes(models, tmp_path, mesh):
    """PyTorch 2.4 had them in torch.distributed._tensor."""
    actor, hf = tmp_path / "actor", models / "qwen3-False"
    actor.mkdir()
    torch.save({key: sharded(tensor, 0, (1,)) for key, tensor in tensors_of(hf).items()}, tmp_path / "new.pt")
    older = {
        b"distributed.tensor\nDTensor\n": b"distributed._tensor.api\nDTensor\n",
        b"distributed.tensor.placement_types\nShard\n": b"distributed._tensor.placement_types\nShard\n",
        b"distributed.tensor._dtensor_spec\nDTensorSpec\n": b"distributed._tensor._dtensor_spec\nDTensorSpec\n",
    }
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(actor / "model_world_size_1_rank_0.pt", "w") as old:
        for item in new.infolist():
            data = new.read(item)
            if item.filename.endswith("data.pkl"):
                for name, earlier in older.items():
                    assert name in data
                    data = data.replace(name, earlier)
            old.writestr(item.filename, data)
    fsdp2hf(actor, tmp_path / "out", hf)
    assert_same_tensors(hf, tmp_path / "out")


def test_verls_tensors_that_do_not_fit_are_named(models, tmp_path):
    hf, actor = models / "qwen2-False", tmp_path / "actor"
    actor.mkdir()
    weights = tensors_of(hf)
    file = actor / "model_world_size_1_rank_0.pt"
    torch.save({f"_orig_mod.{key}": tensor for key, tensor in weights.items()}, file)
    refused("The names in the files begin with _orig_mod", fsdp2hf, actor, tmp_path / "out", hf)
    torch.save({f"base_model.model.{key}.lora_A.default": tensor for key, tensor in weights.items()}, file)
    refused("These are LoRA adapters", fsdp2hf, actor, tmp_path / "out", hf)
    torch.save(weights, actor / "model_world_size_2_rank_0.pt")
    refused("has files of 1 and of 2 ranks", fsdp2hf, actor, tmp_path / "out", hf)


def test_rlinfs_full_weights_and_its_distributed_checkpoint(models, tmp_path):
    import torch.distributed.checkpoint as dcp

    hf = models / "qwen3-False"
    weights = tensors_of(hf)
    full = tmp_path / "full/global_step_3/actor"
    (full / "model_state_dict").mkdir(parents=True)
    torch.save(weights, full / "model_state_dict/full_weights.pt")
    dcp.save({"fsdp_checkpoint": {"model": weights, "optimizers": {"step": torch.zeros(1)}}},
             checkpoint_id=tmp_path / "dcp/actor/dcp_checkpoint", no_dist=True)  # fmt: skip
    for given in (full, tmp_path / "dcp/actor"):
        fsdp2hf(given, tmp_path / f"out-{given.parent.name}", hf)
        assert_same_tensors(hf, tmp_path / f"out-{given.parent.name}")
