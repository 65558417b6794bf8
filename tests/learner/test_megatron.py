"""Megatron-Core in every layout against transformers in one process."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import policy_ranks as ranks
from support.models import make_model

from searchr1.checkpoints.manifest import rank_sums, write_manifest
from searchr1.config.layout import Layout
from searchr1.errors import UserError
from searchr1.files.checksums import take_all

pytestmark = pytest.mark.timeout(600)  # the fixtures start processes that run many small trainings

MODELS = [("qwen2", True), ("qwen3", True), ("llama", False)]
OTHER_MODELS = [("qwen2", False), ("qwen3", False), ("llama", True)]
TWO_RANKS = {
    "tp2": {"tp": 2},
    "tp2-sequence": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "dp2": {},
    "fsdp2": {"backend": "fsdp"},
}


CORRECTION = {"level": "sequence", "bound": "clip", "lower": 0.8, "upper": 1.3, "veto": 0.5, "normalize": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {pair: str(make_model(*pair, folder / f"{pair[0]}-{pair[1]}")) for pair in MODELS + OTHER_MODELS}


@pytest.fixture(scope="module")
def oracles(models):
    return {pair: ranks.oracle({"model": path}) for pair, path in models.items()}


def name_of(pair, layout):
    return f"{pair[0]}-{'tied' if pair[1] else 'untied'}-{layout}"


def jobs_of(pairs, layouts, models):
    return [
        {"name": name_of(pair, layout), "model": models[pair]} | settings
        for pair in pairs
        for layout, settings in layouts.items()
    ]


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory):
    return ranks.run(2, jobs_of(MODELS, TWO_RANKS, models), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def other_two_ranks(models, tmp_path_factory):
    return ranks.run(2, jobs_of(OTHER_MODELS, TWO_RANKS, models), tmp_path_factory.mktemp("two"))


def assert_equal(found, expected, metrics=None):
    """Losses, norms, entropies, log-probabilities and weights to 1e-5."""
    for ours, theirs in zip(found[0]["metrics"], metrics or expected["metrics"], strict=True):
        for key in ("actor/loss", "actor/grad_norm", "actor/entropy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), key
    for rank in found:
        for ours, first in zip(rank["metrics"], found[0]["metrics"], strict=True):  # every rank knows them
            assert {k: v for k, v in ours.items() if "time/" not in k} == {
                k: v for k, v in first.items() if "time/" not in k
            }
        for number, logprobs in rank.get("logprobs", {}).items():
            assert np.allclose(logprobs, expected["logprobs"][number], atol=1e-5)
    for name, weight in expected["weights"].items():
        assert torch.allclose(found[0]["weights"][name], weight, atol=1e-5), name
    assert found[0]["weights"].keys() == expected["weights"].keys()
    assert all(rank["shapes"] == found[0]["shapes"] for rank in found)  # the same buckets everywhere


@pytest.mark.parametrize("layout", TWO_RANKS)
@pytest.mark.parametrize("pair", MODELS, ids=lambda pair: name_of(pair, ""))
def test_five_steps_on_two_ranks_equal_one_process(two_ranks, oracles, pair, layout):
    assert_equal(two_ranks[name_of(pair, layout)], oracles[pair])


@pytest.mark.slow
@pytest.mark.parametrize("layout", TWO_RANKS)
@pytest.mark.parametrize("pair", OTHER_MODELS, ids=lambda pair: name_of(pair, ""))
def test_five_steps_of_the_other_models(other_two_ranks, oracles, pair, layout):
    assert_equal(other_two_ranks[name_of(pair, layout)], oracles[pair])


@pytest.fixture(scope="module")
def more(models, tmp_path_factory):
    """Gradients, recomputation, other packings, half precision and resumed runs; one start of the processes."""
    folder = tmp_path_factory.mktemp("more")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "sizes.json").write_text("{}")
    for name in ("bg", "fsdp"):
        (folder / "checkpoint" / f"actor-{name}").mkdir()
        (folder / "checkpoint" / f"actor-{name}" / "sizes.json").write_text("{}")
    checkpoint = str(folder / "checkpoint" / "actor")
    tied, untied, normed = (models[pair] for pair in (("qwen2", True), ("llama", False), ("qwen3", True)))
    plain = {"distributed_optimizer": False}
    jobs = [
        {"name": "vocab"},
        {"name": "gradients-tp2", "model": tied, "tp": 2, "gradients": True} | plain,
        {"name": "gradients-tp2-sequence", "model": normed, "tp": 2, "sequence_parallel": True, "gradients": True} | plain,
        {"name": "gradients-pp2", "model": tied, "pp": 2, "gradients": True} | plain,
        {"name": "full", "model": normed, "tp": 2, "recompute_granularity": "full", "recompute_method": "block",
         "recompute_num_layers": 3},
        {"name": "uniform", "model": untied, "pp": 2, "recompute_granularity": "full"},
        {"name": "selective", "model": tied, "tp": 2, "recompute_granularity": "selective", "max_tokens": 4096},
        {"name": "reads-tp2", "model": normed, "tp": 2, "sequence_parallel": True, "recompute_granularity": "full",
         "recompute_method": "uniform", "recompute_num_layers": 1, "max_tokens": 70, "steps": [0, 1], "host_reads": True},
        {"name": "reads-dp2", "model": tied, "max_tokens": 60, "steps": [0, 1], "host_reads": True},
        {"name": "reads-fsdp2", "model": untied, "backend": "fsdp", "max_tokens": 60, "steps": [0, 1], "host_reads": True},
        {"name": "overlap", "model": tied, "overlap": True},
        {"name": "bf16", "model": tied, "tp": 2, "precision": "bf16"},
        {"name": "fp16", "model": tied, "pp": 2, "precision": "fp16"},
        {"name": "first", "model": tied, "tp": 2, "steps": [0, 2], "save": checkpoint},
        *(
            {"name": f"corrected-{layout}-{recompute}", "model": tied, "correction": CORRECTION, "max_tokens": 4096,
             "recompute_logprobs": recompute} | TWO_RANKS[layout]
            for layout in ("tp2", "dp2", "fsdp2") for recompute in (True, False)
        ),
        {"name": "weights-only", "model": tied, "pp": 2, "megatron_checkpoint": checkpoint, "steps": [0, 0]},
        {"name": "first-background", "model": tied, "steps": [0, 2], "save": f"{checkpoint}-bg/actor", "background": True},
        {"name": "go-on-background", "model": tied, "pp": 2, "steps": [2, 5], "load": f"{checkpoint}-bg/actor"},
        {"name": "first-fsdp", "model": tied, "steps": [0, 2], "save": f"{checkpoint}-fsdp/actor", "background": True,
         "backend": "fsdp"},
        {"name": "go-on-fsdp", "model": tied, "steps": [2, 5], "load": f"{checkpoint}-fsdp/actor", "backend": "fsdp"},
        {"name": "full-disk", "model": tied, "save": f"{checkpoint}-full/actor", "background": False, "fails": True},
        {"name": "full-disk-background", "model": tied, "save": f"{checkpoint}-full/b", "background": True, "fails": True},
        {"name": "full-disk-fsdp", "model": tied, "save": f"{checkpoint}-full/c", "background": False, "fails": True,
         "backend": "fsdp"},
        {"name": "full-disk-fsdp-background", "model": tied, "save": f"{checkpoint}-full/d", "background": True,
         "fails": True, "backend": "fsdp"},
        {"name": "go-on-tp2", "model": tied, "tp": 2, "steps": [2, 5], "load": checkpoint},
        {"name": "go-on-pp2", "model": tied, "pp": 2, "steps": [2, 5], "load": checkpoint},
        {"name": "go-on-dp2", "model": tied, "steps": [2, 5], "load": checkpoint},
    ]  # fmt: skip
    return ranks.run(2, jobs, folder / "out") | {"checkpoint": checkpoint}


def test_a_vocabulary_over_two_ranks_gives_the_log_probabilities_and_gradients_of_one(more):
    assert max(rank["worst"] for rank in more["vocab"]) < 1e-12


@pytest.mark.parametrize(
    ("layout", "pair"),
    [("tp2", ("qwen2", True)), ("tp2-sequence", ("qwen3", True)), ("pp2", ("qwen2", True))],
)
def test_gradients_equal_one_process(more, oracles, layout, pair):
    found = more[f"gradients-{layout}"][0]["gradients"]
    for name, gradient in oracles[pair]["gradients"].items():
        assert torch.allclose(found[name], gradient, atol=1e-6, rtol=1e-5), name
    assert_equal(more[f"gradients-{layout}"], oracles[pair])


@pytest.mark.parametrize(
    ("name", "pair"), [("full", ("qwen3", True)), ("uniform", ("llama", False)), ("selective", ("qwen2", True))]
)
def test_recomputing_activations_changes_nothing(more, oracles, name, pair):
    assert_equal(more[name], oracles[pair])


@pytest.mark.parametrize("recompute", [True, False])
def test_corrected_losses_are_the_same_in_every_layout(more, oracles, recompute):
    """Normalisation needs the mean weight of the whole mini-batch, wherever its sequences are."""
    one, *others = (more[f"corrected-{layout}-{recompute}"] for layout in ("tp2", "dp2", "fsdp2"))
    if recompute:
        assert one[0]["metrics"][0]["actor/correction_weight"] == pytest.approx(1, abs=1e-5)
        assert 0 < one[0]["metrics"][0]["actor/correction_bounded"] <= 1
    assert one[0]["metrics"][0]["actor/loss"] != pytest.approx(oracles["qwen2", True]["metrics"][0]["actor/loss"], abs=1e-4)
    for other in others:
        for ours, theirs in zip(other[0]["metrics"], one[0]["metrics"], strict=True):
            for key in ("actor/loss", "actor/grad_norm", "actor/correction_weight", "actor/correction_vetoed"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key
        assert all(torch.allclose(other[0]["weights"][n], w, atol=1e-5) for n, w in one[0]["weights"].items())


@pytest.mark.parametrize("layout", ["tp2", "dp2", "fsdp2"])
def test_no_micro_batch_makes_the_host_wait_for_a_gpu(more, layout):
    """Kernels are launched ahead only as long as no result is read back."""
    for rank in more[f"reads-{layout}"]:
        # Megatron compares states of the host's random generator, which are never on a GPU.
        assert [place for place in rank["host_reads"] if "megatron/core/tensor_parallel/random.py" not in place] == []


def test_overlapping_communication_changes_nothing(more, oracles):
    assert_equal(more["overlap"], oracles["qwen2", True])


@pytest.mark.parametrize("name", ["reads-dp2", "go-on-tp2", "go-on-pp2", "go-on-dp2"])
def test_adam_updates_in_one_kernel_also_after_a_resume(more, name):
    for rank in more[name]:
        assert rank["fused"] == [True] * len(rank["fused"]) != []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(more, oracles, precision):
    found, expected = more[precision][0], oracles["qwen2", True]
    for ours, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        assert ours["actor/updates"] == 1
        assert ours["actor/loss"] == pytest.approx(theirs["actor/loss"], abs=0.02)
        assert ours["actor/grad_norm"] == pytest.approx(theirs["actor/grad_norm"], rel=0.05)
    for name, weight in expected["weights"].items():
        assert torch.allclose(found["weights"][name], weight, atol=5e-3, rtol=8e-3), (
            name
        )  # a weight near 1 is a multiple of 1/128


def test_training_can_start_from_a_megatron_checkpoint_of_another_layout(more):
    expected = more["first"][0]["weights"]
    assert all(torch.equal(more["weights-only"][0]["weights"][name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("name", ["background", "fsdp"])
def test_what_is_saved_in_the_background_is_the_state_of_that_moment(more, oracles, name):
    expected = oracles["qwen2", True]
    assert_equal(more[f"go-on-{name}"], expected, expected["metrics"][2:])


@pytest.mark.parametrize(("name", "writers"), [("bg", "0"), ("fsdp", "01")])  # Megatron's data-parallel copies write once
def test_ranks_take_the_sums_of_what_they_write_in_the_background(more, name, writers):
    folder = Path(f"{more['checkpoint']}-{name}")
    known = rank_sums(folder)
    assert known == take_all(folder, sorted(path.relative_to(folder) for path in folder.glob("actor/__*.distcp")))
    assert {file.removeprefix("actor/__")[0] for file in known} == set(writers)


@pytest.mark.parametrize("name", ["", "-background", "-fsdp", "-fsdp-background"])
def test_a_full_disk_is_reported_without_a_traceback(more, name):
    messages = more[f"full-disk{name}"]
    assert any("the disk is full; earlier checkpoints are untouched" in message for message in messages), messages
    assert all(len(message.splitlines()) == 1 for message in messages)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_a_run_saved_at_tp2_goes_on_in_any_layout_as_if_it_had_never_stopped(more, oracles, layout):
    expected = oracles["qwen2", True]
    assert_equal(more[f"go-on-{layout}"], expected, expected["metrics"][2:])


DAMAGES = {
    "missing": r"__1_0.distcp is missing: the checkpoint is damaged; use runner.resume_dir=\S*global_step_1",
    "truncated": r"__1_0.distcp has 1000 bytes instead of \d+: the checkpoint is damaged",
    "flipped": r"__1_0.distcp has changed since it was written .*: the checkpoint is damaged; use \S*global_step_1",
    "unnoticed": r"__1_0.distcp has 1000 bytes instead of \d+ or more: the checkpoint is damaged",
    "other-model": r"cannot load \S+: it is damaged or belongs to another model \(.*q_layernorm",
    "fsdp": r"was not written by actor.training_backend: megatron",
}


def damage(root, checkpoint, kind):
    """A run's folder with two checkpoints, the newer one damaged."""
    for step in (1, 2):
        folder = root / f"global_step_{step}"
        shutil.copytree(checkpoint, folder / "actor")
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        (folder / "sizes.json").write_text(json.dumps(sizes))
    part = folder / "actor/__1_0.distcp"
    if kind == "missing":
        part.unlink()
    elif kind in ("truncated", "unnoticed"):
        with part.open("r+b") as file:
            file.truncate(1000)
    elif kind == "flipped":
        write_manifest(folder, step, {})
        data = bytearray(part.read_bytes())
        data[len(data) // 2] ^= 16
        part.write_bytes(data)
    elif kind == "fsdp":
        (folder / "actor/metadata.json").unlink()
    if kind in ("unnoticed", "fsdp"):  # by the sizes
        (folder / "sizes.json").write_text("{}")
    return str(folder / "actor")


def test_a_damaged_checkpoint_is_rejected_by_name(more, models, tmp_path):
    jobs = []
    for kind in DAMAGES:
        model = models["qwen3" if kind == "other-model" else "qwen2", True]
        folder = damage(tmp_path / kind, more["checkpoint"], kind)
        jobs.append({"name": kind, "model": model, "load": folder, "fails": True})
    found = ranks.run(1, jobs, tmp_path / "out")
    for kind, message in DAMAGES.items():
        assert re.search(message, found[kind][0]), found[kind][0]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_four_ranks_equal_one_process(models, oracles, tmp_path):
    pairs = [("qwen2", True), ("qwen3", False), ("llama", True)]
    layouts = {"tp2-pp2": {"tp": 2, "pp": 2}, "tp2-dp2": {"tp": 2, "sequence_parallel": True}, "pp2-dp2": {"pp": 2},
               "pp4": {"pp": 4}}  # fmt: skip
    found = ranks.run(4, jobs_of(pairs, layouts, models), tmp_path, timeout=900)
    for pair in pairs:
        for layout in layouts:
            assert_equal(found[name_of(pair, layout)], oracles[pair])


def test_the_layout_is_the_one_that_megatron_makes():
    layout = Layout.of(8, 2, 2)
    assert layout.data_parallel == 2
    assert [layout.dp_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [rank for rank in range(8) if layout.is_dp_leader(rank)] == [0, 2]
    with pytest.raises(UserError, match="3 x pipeline_model_parallel_size 1 does not divide the actor's 8 ranks"):
        Layout.of(8, 3, 1)


@pytest.fixture(scope="module", autouse=True)
def no_leftovers(tmp_path_factory):
    yield
    for name in ("two", "more"):
        for folder in tmp_path_factory.getbasetemp().glob(f"{name}*"):
            shutil.rmtree(folder, ignore_errors=True)
