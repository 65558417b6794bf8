"""LoRA against peft: steps, merged weights, checkpoints, exports; one process and two."""

from __future__ import annotations

import copy
import json
import math
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
from support import policy_ranks as ranks
from support.models import make_model
from support.trajectories import random_trajectories

from searchr1.checkpoints.lora import LoraRecord, base_name, is_adapter, merge
from searchr1.checkpoints.manifest import new_checkpoint
from searchr1.checkpoints.model_folder import hash_base_model
from searchr1.checkpoints.to_hf import Options, fsdp2hf
from searchr1.checkpoints.torch_dist import TorchDistFolder
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.learner.lora import full_weights
from searchr1.learner.policy import Policy
from searchr1.preflight.check import check_config

CPU = Device.detect("cpu")
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module", autouse=True)
def own_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(make_model("qwen2", True, tmp_path_factory.mktemp("base"), num_hidden_layers=2))


def make_config(base, **changes):
    config = ranks.make_config(base, {"backend": "fsdp"})
    config.actor.lora.rank, config.actor.lora.alpha, config.actor.lora.target_modules = 4, 6.0, list(TARGETS)
    for name, value in changes.items():
        setattr(config.actor.lora, name, value)
    return config


def weights(policy, dtype=None):
    return {name: tensor.clone() for name, tensor in policy.named_weights(dtype)}


def adapters(policy):
    return {n: p.full_tensor().detach().clone() for n, p in policy.backend.model.named_parameters() if is_adapter(n)}


def train(policy, steps):
    for step in steps:
        trajectories, advantages = random_trajectories(step)
        metrics = policy.train_step(trajectories, advantages, [0] * len(trajectories))
    return metrics


def plain_peft(base, config, start):
    """peft's model of the same adapters, by way of its own wrapper."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    wanted = config.actor.lora
    model = get_peft_model(model, LoraConfig(r=wanted.rank, lora_alpha=wanted.alpha, target_modules=wanted.target_modules))
    own = dict(model.named_parameters())
    for name, tensor in start.items():
        own[f"base_model.model.{name}"].data.copy_(tensor)
    return model


def by_hand(model, config, steps):
    """The policy's updates with peft and torch alone, a sequence at a time."""
    from searchr1.learner.optimizer import lr_factor

    optim, algorithm = config.actor.optim, config.algorithm
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=optim.lr, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps, weight_decay=optim.weight_decay
    )
    factor = lr_factor(config.actor.lr_sched, optim.lr, ranks.STEPS)
    for step in steps:
        trajectories, advantages = random_trajectories(step)
        tokens = sum(int(t.loss_mask.sum()) for t in trajectories)
        for t, advantage in zip(trajectories, advantages, strict=True):
            ids = torch.tensor([*t.sample.prompt_ids, *t.response_ids.tolist()])[None]
            log_p = (model(ids).logits[0, :-1] / algorithm.sampling_params.temperature).log_softmax(-1)
            first = len(t.sample.prompt_ids) - 1
            logp = log_p.gather(-1, ids[0, 1:, None])[:, 0][first:]
            entropy = -(log_p.exp() * log_p).sum(-1)[first:]
            d = logp - torch.tensor(t.ref_logprobs)
            term = -(logp - logp.detach()).exp() * advantage + algorithm.kl_beta * ((-d).exp() - 1 + d)
            ((term - algorithm.entropy_bonus * entropy) * torch.tensor(t.loss_mask)).sum().div(tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, optim.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * factor(step)
        optimizer.step()
        optimizer.zero_grad()


def test_steps_and_merged_weights_equal_peft(base):
    config = make_config(base)
    policy = Policy.start(config, CPU, ranks.STEPS)
    oracle = plain_peft(base, config, adapters(policy))
    before = weights(policy)
    train(policy, [0, 1, 2])
    by_hand(oracle, config, [0, 1, 2])
    ours = adapters(policy)
    theirs = dict(oracle.named_parameters())
    assert len(ours) == 2 * 2 * len(TARGETS)
    for name, tensor in ours.items():
        assert (tensor - theirs[f"base_model.model.{name}"]).abs().max() < 1e-6, name
        assert tensor.abs().max() > 0, name
    # Merged: the same bits as peft's own merge of the same adapters.
    for name, tensor in ours.items():
        theirs[f"base_model.model.{name}"].data.copy_(tensor)
    merged = dict(oracle.merge_and_unload().named_parameters())
    found = weights(policy)
    assert set(found) == set(before) == set(merged)  # the tied output layer is left out of all three
    for name, tensor in found.items():
        assert torch.equal(tensor, merged[name]), name
        is_changed = any(f".{target}.weight" in name for target in TARGETS)
        assert torch.equal(tensor, before[name]) != is_changed, name


def test_only_adapters_are_trained_and_counted_apart(base):
    policy = Policy.start(make_config(base), CPU, ranks.STEPS)
    held = [p for group in policy.backend.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in held) == sum(t.numel() for t in adapters(policy).values())
    assert policy.backend.parameter_count == sum(t.numel() for t in weights(policy).values())


def test_merge_in_float64():
    torch.manual_seed(0)
    w, a, b = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    expected = np.array(
        [
            [w[i, j].double() + 1.5 * sum(b[i, r].double() * a[r, j].double() for r in range(2)) for j in range(5)]
            for i in range(6)
        ]
    )
    assert np.allclose(merge(w, a, b, 1.5).double().numpy(), expected, atol=1e-6)
    assert torch.equal(merge(w.bfloat16(), a, torch.zeros_like(b), 1.5), w.bfloat16().float())


def test_the_reference_is_the_base_model(base):
    config = make_config(base)
    policy = Policy.start(config, CPU, ranks.STEPS)
    reference = Policy.start_reference(config, CPU)
    trajectories, _ = random_trajectories(0)
    start = policy.logprobs(trajectories)
    train(policy, [0, 1])
    after = reference.logprobs(trajectories)
    assert all(np.array_equal(one, two) for one, two in zip(start, after, strict=True))  # B starts at 0
    assert any(not np.allclose(one, two, atol=1e-4) for one, two in zip(policy.logprobs(trajectories), after, strict=True))


def test_base_held_in_compute_precision_with_checkpointing(base):
    config = make_config(base, base_precision="compute")
    config.actor.model.precision, config.actor.model.gradient_checkpointing = "bf16", True
    policy = Policy.start(config, CPU, ranks.STEPS)
    kinds = {is_adapter(n): p.dtype for n, p in policy.backend.model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    before = adapters(policy)
    metrics = train(policy, [0, 1])
    assert math.isfinite(metrics["actor/loss"])
    assert metrics["actor/updates"] == 1
    assert all(not torch.equal(tensor, before[name]) for name, tensor in adapters(policy).items())
    parts = adapters(policy)
    held = {base_name(n): p.full_tensor() for n, p in policy.backend.model.named_parameters() if not is_adapter(n)}
    for name, tensor in full_weights(policy.backend.model):
        stem = name.removesuffix(".weight")
        expected = held[name].double()
        if f"{stem}.lora_A.default.weight" in parts:
            a, b = (parts[f"{stem}.lora_{which}.default.weight"].double() for which in "AB")
            expected = expected + 6.0 / 4 * b @ a
        assert torch.allclose(tensor.double(), expected, atol=1e-6), name


def save(policy, root, step):
    with new_checkpoint(root, step) as folder:
        policy.save(folder / "actor")
    return root / f"global_step_{step}/actor"


def test_resuming_equals_never_having_stopped(base, tmp_path):
    whole, half = (Policy.start(make_config(base), CPU, ranks.STEPS) for _ in range(2))
    train(whole, range(5))
    train(half, range(2))
    folder = save(half, tmp_path, 2)
    with closing(TorchDistFolder(folder)) as files:
        assert len(files.tensors) == 4 * len(adapters(half))  # each with two moments and a count of steps
        assert all(is_adapter(name) for name in files.tensors)
    resumed = Policy.start(make_config(base), CPU, ranks.STEPS)
    resumed.load(folder)
    train(resumed, range(2, 5))
    expected = adapters(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapters(resumed).items())
    assert resumed.backend.learning_rate == whole.backend.learning_rate


def test_offloading_to_host_memory_changes_nothing(base):
    config = make_config(base)
    plain = Policy.start(config, CPU, ranks.STEPS)
    config.actor.fsdp.cpu_offload = True
    offloaded = Policy.start(config, CPU, ranks.STEPS)
    expected, found = train(plain, [0, 1]), train(offloaded, [0, 1])
    assert found["actor/grad_norm"] == expected["actor/grad_norm"]
    merged = weights(plain)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in weights(offloaded).items())


def test_what_is_saved_in_the_background_is_the_state_of_that_moment(base, tmp_path):
    whole, half = (Policy.start(make_config(base), CPU, ranks.STEPS) for _ in range(2))
    train(whole, range(4))
    train(half, range(2))
    with new_checkpoint(tmp_path, 2) as folder:
        half.save(folder / "actor", in_background=True)
        train(half, [4])
        half.finish_save()
    resumed = Policy.start(make_config(base), CPU, ranks.STEPS)
    resumed.load(tmp_path / "global_step_2/actor")
    train(resumed, [2, 3])
    expected = adapters(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapters(resumed).items())


@pytest.mark.parametrize("tied", [True, False])
def test_exports_equal_the_policy(tmp_path, tied):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = str(make_model("qwen3", tied, tmp_path / "base", num_hidden_layers=2))
    policy = Policy.start(make_config(base), CPU, ranks.STEPS)
    train(policy, [0, 1])
    folder = save(policy, tmp_path, 2)
    lines = fsdp2hf(folder, tmp_path / "merged", options=Options(verify=True))
    assert any("identical bit by bit" in line for line in lines)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert all(torch.equal(merged.get_parameter(name), tensor) for name, tensor in weights(policy, torch.float32).items())
    fsdp2hf(folder, tmp_path / "half", options=Options(dtype=torch.bfloat16, verify=True))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert all(torch.equal(half.get_parameter(name), tensor) for name, tensor in weights(policy, torch.bfloat16).items())
    fsdp2hf(folder, tmp_path / "adapter", adapter=True)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.arange(20)[None]
    without = plain(ids).logits.detach()
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    logits = loaded(ids).logits
    assert torch.allclose(logits, merged(ids).logits, atol=1e-5)
    assert (logits - without).abs().max() > 1e-2
    own = dict(loaded.named_parameters())
    assert all(torch.equal(own[f"base_model.model.{name}"], tensor) for name, tensor in adapters(policy).items())


def test_exports_that_cannot_be_are_rejected(base, tmp_path):
    gone = shutil.copytree(base, tmp_path / "gone")
    folder = save(Policy.start(make_config(str(gone)), CPU), tmp_path / "run", 1)
    moved = gone.rename(tmp_path / "moved")
    hash_base_model.cache_clear()
    with pytest.raises(UserError, match=r"gone is neither a folder.*give the base model's folder as --hf-model"):
        fsdp2hf(folder, tmp_path / "out")
    other = make_model("qwen2", True, tmp_path / "other", seed=1, num_hidden_layers=2)
    with pytest.raises(UserError, match="not the base model"):
        fsdp2hf(folder, tmp_path / "out", other)
    assert not (tmp_path / "out").exists()
    fsdp2hf(folder, tmp_path / "out", moved)
    whole = save(Policy.start(make_config(base, rank=0), CPU), tmp_path / "whole", 1)
    with pytest.raises(UserError, match=r"--adapter: .* is no LoRA checkpoint"):
        fsdp2hf(whole, tmp_path / "adapter", adapter=True)


@pytest.mark.slow
def test_two_processes_equal_one(base, tmp_path):
    job = {"name": "lora", "backend": "fsdp", "model": base, "lora": {"rank": 4, "alpha": 6.0, "target_modules": TARGETS}}
    [one] = ranks.run(1, [job], tmp_path / "one")["lora"]
    save_too = job | {"save": str(tmp_path / "saved/actor")}
    two = ranks.run(2, [save_too], tmp_path / "two")["lora"]
    for ours, theirs in zip(two[0]["metrics"], one["metrics"], strict=True):
        for name in ("actor/loss", "actor/kl", "actor/entropy", "actor/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert all(torch.allclose(two[0]["weights"][name], tensor, atol=1e-6) for name, tensor in one["weights"].items())
    # Saved by two processes, loaded by one.
    policy = Policy.start(make_config(base), CPU)
    (tmp_path / "saved/sizes.json").write_text("{}")
    policy.load(tmp_path / "saved/actor")
    assert all(torch.equal(tensor, two[0]["weights"][name]) for name, tensor in weights(policy, torch.float32).items())


def test_a_checkpoint_that_does_not_fit_is_rejected(base, tmp_path):
    policy = Policy.start(make_config(base), CPU, ranks.STEPS)
    folder = save(policy, tmp_path / "lora", 1)
    record = LoraRecord.read(folder)
    assert (record.base_model, record.base_sha256, record.scale) == (base, hash_base_model(base), 1.5)
    with pytest.raises(UserError, match=r"actor\.lora\.rank: 2 here, but 4"):
        Policy.start(make_config(base, rank=2), CPU).load(folder)
    with pytest.raises(UserError, match=r"set actor\.lora\.rank to 4"):
        Policy.start(make_config(base, rank=0), CPU).load(folder)
    other = str(make_model("qwen2", True, tmp_path / "other", seed=1, num_hidden_layers=2))
    with pytest.raises(UserError, match="not the base model"):
        Policy.start(make_config(other), CPU).load(folder)
    whole = save(Policy.start(make_config(base, rank=0), CPU), tmp_path / "whole", 1)
    with pytest.raises(UserError, match="holds a whole model"):
        policy.load(whole)
    (folder / "lora.json").write_text(json.dumps({"rank": 4}))
    with pytest.raises(UserError, match="is damaged"):
        policy.load(folder)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["query"], "no layer named query"),
        (["input_layernorm"], "not a linear layer"),
        (["q_proj", "lm_head"], "lm_head shares its weights with the embedding"),
    ],
)
def test_layers_that_can_have_no_adapter_are_named(base, targets, message):
    with pytest.raises(UserError, match=message):
        Policy.start(make_config(base, target_modules=targets), CPU)


def test_an_engine_that_gets_adapters_must_have_the_actors_base(base):
    config = make_config(base, weight_update="adapter")
    config.actor.model.path = "/another"
    found = {problem.key: problem.message for problem in check_config(config, for_training=True)}
    assert "rollout.model.model_path" in found["actor.lora.weight_update"]


def test_adapters_for_the_engine_are_named_as_peft_names_them(base):
    policy = Policy.start(make_config(base), CPU, ranks.STEPS)
    train(policy, [0, 1])
    found = dict(policy.named_adapters())
    peft = plain_peft(base, make_config(base), {})
    assert found.keys() == {n.replace(".default.weight", ".weight") for n, _ in peft.named_parameters() if is_adapter(n)}
    kept = adapters(policy)
    assert all(torch.equal(found[f"base_model.model.{n.replace('.default', '')}"], tensor) for n, tensor in kept.items())


def test_an_untied_output_layer_can_have_one(tmp_path):
    folder = str(make_model("qwen2", False, tmp_path, num_hidden_layers=1))
    policy = Policy.start(make_config(folder, target_modules=["lm_head"]), CPU, ranks.STEPS)
    before = weights(policy)
    train(policy, [0, 1])
    changed = {name for name, tensor in weights(policy).items() if not torch.equal(tensor, before[name])}
    assert changed == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("changes", "backend", "key"),
    [
        ({}, "megatron", "actor.lora.rank"),
        ({"rank": -1}, "fsdp", "actor.lora.rank"),
        ({"alpha": 0.0}, "fsdp", "actor.lora.alpha"),
        ({"target_modules": []}, "fsdp", "actor.lora.target_modules"),
        ({"target_modules": ["q_proj", "q_proj"]}, "fsdp", "actor.lora.target_modules"),
        ({"base_precision": "int8"}, "fsdp", "actor.lora.base_precision"),
        ({"weight_update": "none"}, "fsdp", "actor.lora.weight_update"),
        ({"weight_update": "adapter", "target_modules": ["q_proj", "lm_head"]}, "fsdp", "actor.lora.weight_update"),
        ({"weight_update": "adapter", "rank": 1024}, "fsdp", "actor.lora.weight_update"),
    ],
)
def test_settings_that_cannot_work_are_rejected(base, changes, backend, key):
    config = make_config(base, **changes)
    config.actor.training_backend = backend
    assert key in [problem.key for problem in check_config(config, for_training=True)]
    fine = copy.deepcopy(make_config(base, weight_update="adapter"))
    assert not [problem for problem in check_config(fine, for_training=True) if problem.key.startswith("actor.")]
