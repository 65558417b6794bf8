"""Who is on a GPU in which phase, in numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from searchr1.commands.plan_memory import main
from searchr1.config.load import load_config
from searchr1.preflight.memory_layout import layout_of
from searchr1.preflight.memory_plan import GIB, PHASES, SHAPES, Layout, knobs, plan_memory

CONFIGS = Path(__file__).resolve().parents[2] / "examples/searchr1/config"
RECIPE = CONFIGS / "qwen2.5-3b-tool-1node.yaml"
OFFLOADS = {"offload_weight": True, "offload_grad": True, "offload_optimizer": True}

LOSS = 256 << 20
LAYER_06B = 1024 * (2048 + 1024 + 1024 + 2048 + 3 * 3072) + 2 * 128 + 2 * 1024
"""Parameters of a layer of Qwen3-0.6B: q, k, v, output, three of the MLP; norms of queries and keys, two of the layer."""
ROOT_06B = 151936 * 1024 + 1024


def test_a_layer_of_0_6b():
    shape = SHAPES["qwen3-0.6b"]
    assert (shape.layer_parameters, 28 * LAYER_06B + ROOT_06B) == (LAYER_06B, shape.parameters)


def test_7b_on_8_gpus_in_every_phase():
    shape = SHAPES["qwen2.5-7b"]
    h, f, q, k, table = 3584, 18944, 3584, 512, 152064 * 3584
    layer = (h * (q + 2 * k) + (q + 2 * k) + q * h + 3 * h * f) // 2 + 2 * h
    own = 28 * layer + table + h  # a half of two tables
    # Rows of 8 shards: all sizes of the model but none of norms and biases leave a rest.
    eighth = (28 * (h * (q + 2 * k) + (q + 2 * k) + q * h + 3 * h * f + 2 * h) + 2 * table + h) // 8
    reference, contexts, asleep = 4 * eighth, 3 * GIB, GIB // 2
    plan = plan_memory(shape, Layout("megatron", 8, tp=2, **OFFLOADS))
    assert plan.total("start") == 6 * own + 12 * own // 4 + reference + contexts + asleep
    scoring = 2 * (3 * (2 * layer - 2 * h) + 2 * table + h) + 2 * 11008 * 152064 + LOSS
    assert plan.total("rollout") == 60 * GIB + reference + scoring + contexts
    assert plan.total("save") == 2 * own + 12 * own // 4 + reference + contexts + asleep
    bucket = 512 << 20
    sync = 2 * own + 2 * 2 * table + bucket + reference + contexts + asleep  # twice with TP
    # The engine's weights, and the largest tensor on its way: as it comes, and as the engine will hold it.
    assert plan.total("sync") == sync + 2 * shape.parameters + 2 * 2 * table
    assert plan.total("wake") == 60 * GIB + reference + contexts
    assert plan.fits(80 * GIB)
    # The engine's 60 GiB beside the first checkpoint were too much.
    assert plan.total("save") - asleep + 60 * GIB > 80 * GIB


def test_what_stays_on_the_gpu_is_there_in_every_phase():
    shape = SHAPES["qwen2.5-7b"]
    layout = Layout("megatron", 8, tp=2, **OFFLOADS)
    away, kept = plan_memory(shape, layout), plan_memory(shape, replace(layout, **dict.fromkeys(OFFLOADS, False)))
    own = away.parameters
    more = {phase: kept.total(phase) - away.total(phase) for phase in PHASES}
    state = 6 * own + 12 * own // 4
    assert more == {
        "start": 0, "rollout": state, "train": 0, "save": 4 * own, "sync": state - 2 * own, "wake": state,
    }  # fmt: skip


def test_the_reference_scores_during_the_rollout():
    shape = SHAPES["qwen3-0.6b"]
    layout = Layout(gpus=1, reference_gpus=1, max_tokens=4096, cpu_offload=True, recompute="full")
    plan = plan_memory(shape, layout)
    forward = 2 * (3 * LAYER_06B + ROOT_06B) + 2 * 4096 * 151936 + LOSS
    assert plan.total("rollout") - plan.total("wake") == forward
    half = plan_memory(shape, replace(layout, policy_share=0.5))
    assert plan.total("rollout") - half.total("rollout") == 4096 * 151936
    none = plan_memory(shape, replace(layout, reference=False))
    for phase in ("start", "train", "save", "sync", "wake"):
        margin = 1.05 if phase == "train" else 1
        assert plan.total(phase) - none.total(phase) == pytest.approx(margin * (4 * shape.parameters + GIB), rel=1e-6)
    assert none.total("rollout") == none.total("wake")


def test_the_probe_runs_while_the_engine_sleeps():
    shape = SHAPES["qwen3-0.6b"]
    layout = Layout(gpus=1, reference=False, max_tokens=4096)
    plain, probed = plan_memory(shape, layout), plan_memory(shape, replace(layout, probe_tokens=1024))
    more = {phase: probed.total(phase) - plain.total(phase) for phase in PHASES}
    forward = 2 * (3 * LAYER_06B + ROOT_06B) + 2 * 1024 * 151936 + LOSS
    assert more == dict.fromkeys(PHASES, 0) | {"start": forward}
    longer = plan_memory(shape, replace(layout, probe_tokens=9000))  # a micro-batch has no more than 4096
    assert longer.total("start") - probed.total("start") == 2 * 3072 * 151936


def test_engines_on_their_own_gpus_never_meet_the_actor():
    shape = SHAPES["qwen2.5-3b"]
    plan = plan_memory(shape, Layout(shared=False, reference=False))
    assert not [line.name for line in plan.lines if "engine" in line.name]
    # A cache that does not fit beside the context is found where the engine is.
    full = plan_memory(shape, Layout(shared=False, reference=False, engine_share=0.99))
    assert (full.where, full.fits(80 * GIB)) == ("engine", False)
    assert full.peak == round(0.99 * 80 * GIB) + GIB


def test_groups_on_gpus_without_the_actor():
    base = ["actor.training_backend=fsdp", "actor.offload_weight=False", "actor.offload_grad=False",
            "actor.offload_optimizer=False"]  # fmt: skip
    shape = SHAPES["qwen2.5-3b"]

    def layout(placement, *more):
        return layout_of(load_config(RECIPE, [f"++cluster.component_placement={placement}", *base, *more]), 8)

    found = layout("{actor: 0-3, rollout: 4-7, reward: 0, inference: 4-7}")
    assert (found.shared, found.reference, found.reference_by_engine) == (False, False, True)
    (engine,) = [plan for plan in [plan_memory(shape, replace(found, engine_share=0.94))] if plan.where == "engine"]
    # In the rollout: engine, a quarter of the reference's shards, its pass, two contexts.
    scoring = 2 * (3 * shape.layer_parameters + 151936 * 2048 + 2048) + 2 * 11008 * 151936 + LOSS
    quarter = shape.parameters // 4
    assert engine.total("rollout") == pytest.approx(round(0.94 * 80 * GIB) + 4 * quarter + scoring + 2 * GIB, rel=1e-6)
    found = layout("{actor: 0-3, rollout: 0-3, reward: 0, critic: 4-7}", "algorithm.adv_type=gae", "algorithm.group_size=1",
                   "critic.use_critic_model=True")  # fmt: skip
    assert found.critic_apart
    assert not found.critic.shared
    plan = plan_memory(shape, found)
    assert not [line.name for line in plan.lines if line.name.startswith("critic")]
    large = replace(found, critic=replace(found.critic, max_tokens=200_000))
    assert plan_memory(shape, large).where == "critic"


def test_adapters_and_eager_engines():
    shape, adapters = SHAPES["qwen2.5-3b"], {"lora_rank": 16, "lora_targets": ("q_proj",)}
    merged = plan_memory(shape, Layout(gpus=1, reference=False, **adapters))
    sent = plan_memory(shape, Layout(gpus=1, reference=False, adapter_updates=True, **adapters))
    matrices = 36 * 16 * (2048 + 2048)
    table = 151936 * 2048
    # Merged: a table gathered, a bucket on its way, the table twice in the engine. Alone: gathered in fp32, cast, loaded.
    assert merged.total("sync") - sent.total("sync") == (2 + 2 * 2) * table + (512 << 20) - (6 + 2) * matrices
    eager = plan_memory(shape, Layout(gpus=1, reference=False, engine_eager=True, **adapters))
    assert {phase: merged.total(phase) - eager.total(phase) for phase in PHASES} == {
        "start": GIB // 2, "rollout": 0, "train": GIB // 2 + merged_margin(merged, eager), "save": GIB // 2,
        "sync": GIB // 2, "wake": 0,
    }  # fmt: skip


def merged_margin(one, other):
    return sum(x.size for x in one.lines if x.name == "margin") - sum(x.size for x in other.lines if x.name == "margin")


def test_a_cache_of_a_given_size_goes_before_the_share():
    shape = SHAPES["qwen2.5-3b"]
    plan = plan_memory(shape, Layout(engine_cache=4 * GIB))
    assert plan.total("wake") - plan_memory(shape, Layout()).total("wake") == 2 * shape.parameters + 6 * GIB - 60 * GIB
    too_much = Layout(engine_cache=76 * GIB)
    (found,) = [plan for text, _, plan in knobs(shape, too_much, 80 * GIB) if "kv_cache_memory_gb: 38" in text]
    assert found.fits(80 * GIB)


def test_an_evaluations_engine(capsys):
    # 4.5 GiB for a model of 1.1: 2 to work in, and a cache of 1.4, that is 13,000 tokens of 114,688 bytes.
    words = [str(CONFIGS / "qwen2.5-3b-tool-1node-eval.yaml"), "--shape", "qwen3-0.6b", "--gpu-gib", "6"]
    assert main([*words, "rollout.gpu_memory_utilization=0.75", "runner.seq_length=12000"]) == 0
    assert main([*words, "rollout.gpu_memory_utilization=0.75", "runner.seq_length=14000"]) == 1
    assert "cache of one trajectory 1.5 GiB" in " ".join(capsys.readouterr().out.split())
    # A given size goes before the share here too: 1.1 + 2 + 2 and the context.
    assert main([*words, "rollout.vllm.kv_cache_memory_gb=2.0"]) == 1
    assert "Does not fit: 0.1 GiB too much" in capsys.readouterr().out


def test_the_cache_holds_one_trajectory():
    # 3B: keys and values of 36 layers, two heads of 128, in bf16: 36,864 bytes a token.
    shape, gpu = SHAPES["qwen2.5-3b"], 16 * GIB
    weights = 2 * shape.parameters
    fits = round(weights + 2 * GIB + 7096 * 36864)
    layout = Layout(longest=7096, engine_share=fits / gpu, gpus=64, reference=False)
    assert not plan_memory(shape, layout, gpu).problem
    problem = plan_memory(shape, replace(layout, longest=7200), gpu).problem
    assert "cache of one trajectory 0.2 GiB" in problem
    assert "rollout.gpu_memory_utilization" in problem


def test_the_12_gb_recipe(capsys):
    path = str(CONFIGS / "qwen3-0.6b-1gpu.yaml")
    assert main([path, "--gpu-gib", "11.99"]) == 0
    plan = plan_memory(SHAPES["qwen3-0.6b"], layout_of(load_config(path), 1), 12 * GIB)
    parameters = 28 * LAYER_06B + ROOT_06B
    scoring = 2 * (3 * LAYER_06B + ROOT_06B) + 2 * 4096 * 151936 + LOSS
    assert plan.worst == "rollout"
    assert plan.peak == round(0.4 * 12 * GIB) + 4 * parameters + scoring + 3 * GIB
    # The public set-up's share leaves no room for the reference model's pass.
    assert main([path, "rollout.gpu_memory_utilization=0.5", "--gpu-gib", "12"]) == 1
    assert "rollout over" in capsys.readouterr().out
