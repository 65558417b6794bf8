"""The FSDP2 actor against a plain loop, over processes, and across a stop."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.trajectories import random_trajectories

from searchr1.checkpoints.manifest import (
    checkpoint_steps,
    latest_checkpoint,
    new_checkpoint,
    prune_checkpoints,
    read_contents,
    verify_checkpoint,
)
from searchr1.checkpoints.to_hf import fsdp2hf
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.learner.policy import Policy

CPU = Device.detect("cpu")


@pytest.fixture(scope="module", autouse=True)
def own_process_group():
    """The actor joins a default process group; other tests of this process (vLLM's engine) need to make their own."""
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from searchr1.demo.cold_start_rows import train_tokenizer

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, initializer_range=0.03,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
    train_tokenizer().save_pretrained(path)
    return str(path)


def make_config(model_path, **algorithm):
    config = Config()
    config.rollout.model.model_path = model_path
    config.rollout.model.precision = "fp32"
    config.runner.max_tokens_per_mbs = 96
    config.actor.optim.lr = 1e-3
    # Large, so that rounding in tiny gradients is not blown up to whole steps.
    config.actor.optim.adam_eps = 1e-3
    config.algorithm.kl_beta = 0.1
    config.algorithm.calculate_entropy = True
    for name, value in algorithm.items():
        setattr(config.algorithm, name, value)
    return config


def make_trajectories(count=8, seed=0):
    return random_trajectories(seed, count, vocab=2048, level=-7.6)


def weights(actor):
    return {name: tensor.clone() for name, tensor in actor.named_weights()}


def by_hand(model_path, config, steps):
    """The same updates with transformers and torch.optim alone, a sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optim = config.actor.optim
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=optim.lr, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps,
    )  # fmt: skip
    for trajectories, advantages in steps:
        tokens = sum(int(t.loss_mask.sum()) for t in trajectories)
        for t, advantage in zip(trajectories, advantages, strict=True):
            ids = torch.tensor([*t.sample.prompt_ids, *t.response_ids.tolist()])[None]
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            logp = logp[len(t.sample.prompt_ids) - 1 :]
            mask = torch.tensor(t.loss_mask)
            old = logp.detach() if config.algorithm.recompute_logprobs else torch.tensor(t.rollout_logprobs)
            ratio = (logp - old).exp()
            clipped = ratio.clamp(1 - config.algorithm.ratio_clip_eps, 1 + config.algorithm.ratio_clip_eps)
            policy = -torch.minimum(ratio * advantage, clipped * advantage)
            d = logp - torch.tensor(t.ref_logprobs)
            kl = (-d).exp() - 1 + d
            loss = ((policy + config.algorithm.kl_beta * kl) * mask).sum() / tokens
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("recompute", [True, False])
def test_three_steps_equal_a_plain_loop(model_path, recompute):
    config = make_config(model_path, recompute_logprobs=recompute)
    actor = Policy.start(config, CPU)
    steps = [make_trajectories(seed=seed) for seed in range(3)]
    for trajectories, advantages in steps:
        metrics = actor.train_step(trajectories, advantages, [0] * len(trajectories))
    expected = by_hand(model_path, config, steps)
    for name, tensor in weights(actor).items():
        assert torch.allclose(tensor, expected[name].detach(), atol=2e-6), name
    assert metrics["actor/updates"] == 1
    assert metrics["actor/skipped_updates"] == 0
    if recompute:
        assert metrics["actor/ratio"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("max_tokens", [48, 96, 4096])
def test_micro_batch_size_changes_nothing(model_path, max_tokens):
    results = []
    for tokens in (64, max_tokens):
        config = make_config(model_path)
        config.runner.max_tokens_per_mbs = tokens
        actor = Policy.start(config, CPU)
        trajectories, advantages = make_trajectories()
        results.append((actor.train_step(trajectories, advantages, [0] * 8), weights(actor)))
    (first, w1), (second, w2) = results
    assert first["actor/loss"] == pytest.approx(second["actor/loss"], abs=1e-6)
    assert first["actor/grad_norm"] == pytest.approx(second["actor/grad_norm"], rel=1e-5)
    assert all(torch.allclose(w1[name], w2[name], atol=2e-5) for name in w1)


def test_old_logprobs_of_later_minibatches_are_those_before_the_first_update(model_path):
    config = make_config(model_path, n_minibatches=2)
    actor = Policy.start(config, CPU)
    trajectories, advantages = make_trajectories()
    gaps = [(p - t.rollout_logprobs)[t.loss_mask] for p, t in zip(actor.logprobs(trajectories), trajectories, strict=True)]
    ids = [t.sample.index // 2 for t in trajectories]
    metrics = actor.train_step(trajectories, advantages, ids)
    assert metrics["actor/updates"] == 2
    # The mismatch is that of all tokens, before any update.
    assert metrics["mismatch/kl"] == pytest.approx(-np.concatenate(gaps).mean(), abs=1e-6)
    # The second mini-batch's ratio has moved away from 1, the first one's has not.
    assert abs(metrics["actor/ratio_max"] - 1) > 1e-5


def test_non_finite_gradient_skips_the_update(model_path):
    actor = Policy.start(make_config(model_path), CPU)
    before = weights(actor)
    trajectories, advantages = make_trajectories()
    metrics = actor.train_step(trajectories, [1e38] * 8, [0] * 8)
    assert metrics["actor/skipped_updates"] == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(actor).items())
    metrics = actor.train_step(trajectories, advantages, [0] * 8)
    assert metrics["actor/updates"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in weights(actor).values())


def test_a_ratio_that_is_too_large_drops_the_update_and_one_that_is_no_number_is_a_failure(model_path):
    """`runner.health` stops a run whose updates fail, not one whose ratio is too large now and then."""
    actor = Policy.start(make_config(model_path, recompute_logprobs=False, early_stop_imp_ratio=2.0), CPU)
    before = weights(actor)
    trajectories, advantages = make_trajectories()
    for change, name in ((-1.0, "early_stopped"), (np.nan, "skipped_updates")):
        first = replace(trajectories[0], rollout_logprobs=trajectories[0].rollout_logprobs + np.float32(change))
        others = [replace(t, rollout_logprobs=t.rollout_logprobs - np.float32(1.0)) for t in trajectories[1:]]
        metrics = actor.train_step([first, *others], advantages, [0] * 8)
        assert [metrics[f"actor/{key}"] for key in ("updates", name)] == [0, 1]
        assert all(torch.equal(before[name], tensor) for name, tensor in weights(actor).items())


def test_logprobs_are_response_aligned_and_match_transformers(model_path):
    from transformers import AutoModelForCausalLM

    actor = Policy.start(make_config(model_path), CPU)
    trajectories, _ = make_trajectories()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for t, found in zip(trajectories, actor.logprobs(trajectories), strict=True):
        ids = torch.tensor([*t.sample.prompt_ids, *t.response_ids.tolist()])[None]
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].numpy()
        expected = np.where(t.loss_mask, logp[len(t.sample.prompt_ids) - 1 :], 0)
        assert np.allclose(found, expected, atol=1e-5)
    probe = actor.probe_logprobs([[5, 6, 7], [8, 9]])
    assert [len(values) for values in probe] == [3, 2]
    assert probe[0][0] == 0
    assert probe[0][1] < 0


def save(actor, root: Path, step: int) -> Path:
    with new_checkpoint(root, step) as folder:
        actor.save(folder / "actor")
    return root / f"global_step_{step}"


def test_resuming_equals_never_having_stopped(model_path, tmp_path):
    def make():
        config = make_config(model_path)
        config.actor.lr_sched.lr_decay_style = "cosine"
        config.actor.lr_sched.lr_warmup_iters = 2
        return Policy.start(config, CPU, total_steps=6)

    steps = [make_trajectories(seed=seed) for seed in range(5)]
    whole, halves = make(), make()
    for number, (trajectories, advantages) in enumerate(steps):
        whole.train_step(trajectories, advantages, [0] * 8)
        if number < 2:
            halves.train_step(trajectories, advantages, [0] * 8)
    save(halves, tmp_path, 2)
    resumed = make()
    resumed.load(latest_checkpoint(tmp_path) / "actor")
    for trajectories, advantages in steps[2:]:
        metrics = resumed.train_step(trajectories, advantages, [0] * 8)
    assert metrics["actor/lr"] == whole.backend.schedule.get_last_lr()[0]
    expected = weights(whole)
    assert all(torch.allclose(tensor, expected[name], atol=1e-7) for name, tensor in weights(resumed).items())


def test_damaged_checkpoint_is_named_with_an_older_one(model_path, tmp_path):
    actor = Policy.start(make_config(model_path), CPU)
    save(actor, tmp_path, 1)
    newest = save(actor, tmp_path, 2)
    shard = next(newest.glob("actor/*.distcp"))
    with shard.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"distcp has 100 bytes.*global_step_1"):
        latest_checkpoint(tmp_path)
    with pytest.raises(UserError, match="damaged"):
        actor.load(newest / "actor")
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        latest_checkpoint(tmp_path)


def test_flipped_bits_are_named_before_anything_is_loaded(model_path, tmp_path):
    from support.bit_flips import flipped, random_flips

    actor = Policy.start(make_config(model_path), CPU)
    older, newest = save(actor, tmp_path, 1), save(actor, tmp_path, 2)
    before = weights(actor)
    names = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert names >= {"manifest.json", "actor/.metadata", "actor/__0_0.distcp", "actor/extra.pt", "actor/hf/config.json"}
    for number, (path, bit) in enumerate(random_flips(newest, 200)):
        with flipped(path, bit):
            with pytest.raises(UserError, match=rf"^{re.escape(str(path))} .*damaged.*; use runner.resume_dir={older}"):
                latest_checkpoint(tmp_path)
            if number < len(names):  # each file once
                with pytest.raises(UserError, match=rf"^{re.escape(str(path))} .*damaged"):
                    actor.load(newest / "actor")
                with pytest.raises(UserError, match=rf"^{re.escape(str(path))} .*damaged"):
                    fsdp2hf(newest / "actor", tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(actor).items())
    actor.load(newest / "actor")
    # One rank reads, and only where nobody has.
    with flipped(newest / "actor/hf/config.json", 0):
        actor.load(newest / "actor", verified=True)


@pytest.mark.parametrize("in_background", [False, True])
def test_sums_are_those_of_the_files_however_they_were_written(model_path, tmp_path, in_background):
    actor = Policy.start(make_config(model_path), CPU)
    with new_checkpoint(tmp_path, 1) as folder:
        actor.save(folder / "actor", in_background)
        actor.finish_save()
        assert [path.name for path in folder.rglob(".sums_*")] == [".sums_0.json"] * in_background
    written = tmp_path / "global_step_1"
    verify_checkpoint(written)
    files = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    assert {*read_contents(written).files, "manifest.json"} == files


def test_stop_while_saving_leaves_the_earlier_checkpoint(model_path, tmp_path):
    actor = Policy.start(make_config(model_path), CPU)
    save(actor, tmp_path, 1)
    with pytest.raises(KeyboardInterrupt), new_checkpoint(tmp_path, 2) as folder:  # noqa: PT012
        actor.save(folder / "actor")
        raise KeyboardInterrupt
    assert checkpoint_steps(tmp_path) == [1]
    (tmp_path / ".partial_step_9_1").mkdir()  # what a killed process leaves
    save(actor, tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_1", "global_step_3"]
    prune_checkpoints(tmp_path, 1)
    assert checkpoint_steps(tmp_path) == [3]


def test_full_disk_is_reported_and_nothing_is_lost(model_path, tmp_path):
    actor = Policy.start(make_config(model_path), CPU)
    save(actor, tmp_path, 1)
    with pytest.raises(UserError, match="the disk is full"), new_checkpoint(tmp_path, 2):
        raise OSError(28, "No space left on device")
    assert checkpoint_steps(tmp_path) == [1]
    assert latest_checkpoint(tmp_path) == tmp_path / "global_step_1"


def test_exported_model_gives_the_same_logits(model_path, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    actor = Policy.start(make_config(model_path), CPU)
    trajectories, advantages = make_trajectories()
    actor.train_step(trajectories, advantages, [0] * 8)
    checkpoint = save(actor, tmp_path / "checkpoints", 1)
    fsdp2hf(checkpoint / "actor", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 2048
    for name, tensor in weights(actor).items():
        assert torch.equal(model.get_parameter(name), tensor), name
    with pytest.raises(UserError, match="not empty"):
        fsdp2hf(checkpoint / "actor", tmp_path / "out")
    # A config of another model: every tensor that does not fit is rejected by name.
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((tmp_path / "out/config.json").read_text()) | {"intermediate_size": 64, "num_hidden_layers": 3}
    config.pop("layer_types", None)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"missing model\.layers\.2"):
        fsdp2hf(checkpoint / "actor", tmp_path / "out2", other)
    assert not (tmp_path / "out2").exists()


WORKER = """
import copy, os, sys, torch
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import test_fsdp_core as here
path, out = sys.argv[2], sys.argv[3]
actor = here.Policy.start(here.make_config(path, n_minibatches=2), here.CPU)
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
results = []
for seed in range(2):
    trajectories, advantages = here.make_trajectories(seed=seed)
    ids = [t.sample.index // 2 for t in trajectories]
    # Uneven on purpose: rank 0 has one trajectory of the first mini-batch only, rank 1 the others.
    mine = [i for i in range(8) if world == 1 or (i == 0) == (rank == 0)]
    results.append(actor.train_step([trajectories[i] for i in mine], [advantages[i] for i in mine], [ids[i] for i in mine]))
final = here.weights(actor)
from pathlib import Path
actor.save(Path(out + "-ckpt"))
if rank == 0:
    torch.save((results, final), out)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def run_processes(world, model_path, out, port):
    processes = []
    for rank in range(world):
        env = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        words = [sys.executable, "-c", WORKER, os.path.abspath(__file__), model_path, str(out)]
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in processes:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output[-3000:]
    return torch.load(out, weights_only=False)


def test_two_processes_equal_one(model_path, tmp_path):
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    one, one_weights = run_processes(1, model_path, tmp_path / "one", port)
    two, two_weights = run_processes(2, model_path, tmp_path / "two", port)
    for ours, theirs in zip(two, one, strict=True):
        for name in ("actor/loss", "actor/kl", "actor/entropy", "actor/grad_norm", "mismatch/kl_k3", "actor/policy_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert all(torch.allclose(two_weights[name], one_weights[name], atol=1e-5) for name in one_weights)
    # Saved by two processes, loaded by one.
    actor = Policy.start(make_config(model_path), CPU)
    (tmp_path / "sizes.json").write_text("{}")
    actor.load(tmp_path / "two-ckpt")
    assert all(torch.equal(tensor, two_weights[name]) for name, tensor in weights(actor).items())


def test_config_is_not_changed_by_training(model_path):
    config = make_config(model_path)
    before = copy.deepcopy(config)
    actor = Policy.start(config, CPU)
    trajectories, advantages = make_trajectories()
    actor.train_step(trajectories, advantages, [0] * 8)
    assert config == before
