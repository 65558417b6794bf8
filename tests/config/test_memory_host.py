"""Host memory: of a run on a CPU, against what the machine has, and beside a run on GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import searchr1.commands.plan_memory
import searchr1.device
from searchr1.commands.plan_memory import main
from searchr1.config.load import load_config
from searchr1.device import Device, usable_memory
from searchr1.preflight.memory_host import Processes, plan_cpu, plan_gpu_host
from searchr1.preflight.memory_layout import layout_of
from searchr1.preflight.memory_plan import GIB, SHAPES

CONFIGS = Path(__file__).resolve().parents[2] / "examples/searchr1/config"
TINY, RECIPE = CONFIGS / "tiny-cpu.yaml", CONFIGS / "qwen2.5-3b-tool-1node.yaml"
SHAPE = ["--shape", "qwen2.5-0.5b"]
HALF = SHAPES["qwen2.5-0.5b"]


def sizes(plan):
    return {line.name: line.size for line in plan.lines}


def test_a_cpu_run_is_planned_in_host_memory(capsys):
    config = load_config(TINY)
    found = sizes(plan_cpu(HALF, config, for_training=True))
    parameters = 24 * (896 * (896 + 128 + 128 + 896 + 3 * 4864) + 896 + 2 * 128 + 2 * 896) + 151936 * 896 + 896
    assert parameters == HALF.parameters
    assert found["actor's state"] == 12 * parameters  # fp32 weights, and two moments
    assert found["engine's weights"] == 4 * parameters
    assert found["engine's cache"] == GIB // 2  # kv_cache_memory_gb: 0.5
    assert found["reference model"] == 4 * parameters
    assert found["processes"] == 4 * 3 * GIB // 4  # actor, reference, engine, reward
    assert found["weight buffers"] == GIB
    assert main([str(TINY), *SHAPE, "--host-gib", "64"]) == 0
    text = capsys.readouterr().out
    assert "device   cpu, 64.0 GiB of memory as --host-gib says" in text
    assert "GPU" not in text
    assert main([str(TINY), *SHAPE, "--host-gib", "4"]) == 1
    assert "Does not fit" in capsys.readouterr().out


def test_a_cpu_run_is_held_against_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(searchr1.commands.plan_memory, "usable_memory", lambda: 5 * GIB)
    assert main([str(TINY), *SHAPE]) == 1
    text = capsys.readouterr().out
    assert "device   cpu, 5.0 GiB of memory of this machine" in text
    assert "rollout.vllm.kv_cache_memory_gb" in text
    assert main([str(TINY), *SHAPE, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["host_bytes"], found["fits"]) == ("cpu", 5 * GIB, False)
    assert found["totals"]["train"] == sum(line["size"] for line in found["lines"] if "train" in line["phases"])
    # `auto` on a laptop asks about the GPUs that are to be rented.
    assert main([str(TINY), *SHAPE, "cluster.device=auto", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu_bytes"] == 80 * GIB


def test_every_process_of_a_cpu_run_counts():
    one = sizes(plan_cpu(HALF, load_config(TINY), for_training=True))
    two = load_config(TINY, ["cluster.slots=2", "++cluster.component_placement={actor: 0-1, rollout: 0-1, reward: 0}"])
    found = sizes(plan_cpu(HALF, two, for_training=True))
    assert found["engine's weights"] == 2 * one["engine's weights"]
    assert found["engine's cache"] == 2 * one["engine's cache"]
    assert found["actor's state"] == pytest.approx(one["actor's state"], rel=1e-3)  # two halves
    # Two copies of the reference as well: `slots` says so (config/placement.py).
    assert Processes.of(two, Device.detect("cpu"), True).total == 2 + 2 + 2 + 1
    critic = load_config(TINY, ["algorithm.adv_type=gae", "critic.use_critic_model=True"])
    assert sizes(plan_cpu(HALF, critic, True))["critic's state"] == 12 * (HALF.parameters + 896)
    alone = plan_cpu(HALF, load_config(CONFIGS / "tiny-cpu-eval.yaml"), for_training=False)
    assert not [name for name in sizes(alone) if "actor" in name or "reference" in name]


def test_a_cache_that_is_too_small_is_named(capsys):
    # fp32: 2 x 4 bytes x 24 layers x 128 wide = 24,576 a token; 640 of them take 15 MiB.
    assert not plan_cpu(HALF, load_config(TINY, ["rollout.vllm.kv_cache_memory_gb=0.0147"]), True).problem
    assert main([str(TINY), *SHAPE, "rollout.vllm.kv_cache_memory_gb=0.0146", "--host-gib", "64"]) == 1
    assert "raise rollout.vllm.kv_cache_memory_gb" in " ".join(capsys.readouterr().out.split())


def test_a_containers_limit_counts(monkeypatch):
    whole = usable_memory()
    assert whole > 0
    texts = {"/sys/fs/cgroup/memory.max": "1073741824\n"}

    def read(self, *_, **__):
        if str(self) not in texts:
            raise FileNotFoundError(self)
        return texts[str(self)]

    monkeypatch.setattr(searchr1.device.Path, "read_text", read)
    assert usable_memory() == GIB
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    assert usable_memory() >= whole
    texts["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = str(2 * GIB)
    assert usable_memory() == 2 * GIB


def test_what_leaves_the_gpus_lies_in_host_memory(capsys):
    shape, config = SHAPES["qwen2.5-3b"], load_config(RECIPE)
    layout = layout_of(config, 8)
    found = sizes(plan_gpu_host(shape, config, layout, 8))
    n = shape.parameters
    # bf16 weights on each of 8 ranks; master weights and moments once.
    assert found["actor's weights"] == 8 * 2 * n
    assert found["actor's optimizer"] == pytest.approx(12 * n, rel=1e-6)
    assert found["weight buffers"] == GIB
    assert found["processes"] == (8 + 8 + 8 + 8) * 2 * GIB  # actor, reference, engines, reward
    assert "sleeping engines" not in found  # they drop their weights
    stays = replace(layout, offload_weight=False, offload_optimizer=False)
    assert not [name for name in sizes(plan_gpu_host(shape, config, stays, 8)) if name.startswith("actor")]
    cut = replace(layout, tp=2, pp=2)
    assert sizes(plan_gpu_host(shape, config, cut, 8))["actor's optimizer"] == pytest.approx(12 * n, rel=0.11)
    assert main([str(RECIPE), "--host-gib", "200"]) == 0
    assert "Host memory, all processes together: 146 GiB (actor's weights 46.0, actor's optimizer 34.5" in (
        " ".join(capsys.readouterr().out.split())
    )
    assert main([str(RECIPE), "--host-gib", "128"]) == 1
    assert "Does not fit the host" in " ".join(capsys.readouterr().out.split())


def test_host_memory_with_adapters_and_with_cpu_offload():
    shape, fsdp = SHAPES["qwen2.5-3b"], ["actor.training_backend=fsdp", "runner.async_save=True"]
    config = load_config(RECIPE, [*fsdp, "actor.lora.rank=16", "actor.lora.weight_update=adapter"])
    found = sizes(plan_gpu_host(shape, config, layout_of(config, 8), 8))
    # Nobody brings the base weights again, so each engine keeps its own.
    assert found["sleeping engines"] == 8 * 2 * shape.parameters
    config = load_config(RECIPE, [*fsdp, "actor.fsdp.cpu_offload=True"])
    found = sizes(plan_gpu_host(shape, config, layout_of(config, 8), 8))
    n = shape.parameters
    assert found["actor's weights"] == pytest.approx(4 * n, rel=1e-4)
    assert found["actor's optimizer"] == pytest.approx(8 * n, rel=1e-4)
    assert found["actor's gradients"] == pytest.approx(4 * n, rel=1e-4)
    assert found["checkpoint"] == pytest.approx(12 * n, rel=1e-4)
    alone = load_config(CONFIGS / "qwen2.5-3b-tool-1node-eval.yaml")
    assert set(sizes(plan_gpu_host(shape, alone, None, 8))) == {"processes", "Ray and the driver"}
