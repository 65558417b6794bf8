"""Several machines, and precisions that the hardware lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

import searchr1.device
from searchr1.commands import flags
from searchr1.commands.check_config import main as check_config_command
from searchr1.commands.demo import main as demo_command
from searchr1.commands.eval import main as eval_command
from searchr1.commands.plan_memory import main as plan_memory_command
from searchr1.commands.train import main as train_command
from searchr1.config.load import load_config
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.preflight import check_device
from searchr1.preflight.check import check_config, warnings
from searchr1.preflight.check_device import require_precision

CONFIGS = Path(__file__).resolve().parents[2] / "examples/searchr1/config"
TRAIN, EVAL = CONFIGS / "tiny-cpu.yaml", CONFIGS / "tiny-cpu-eval.yaml"
NODES = "cluster.num_nodes=2"
RLINF = Path(__file__).parent / "fixtures/rlinf-train.yaml"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (train_command, [TRAIN, NODES]),
        (eval_command, [EVAL, NODES]),
        (check_config_command, [TRAIN, NODES]),
        (check_config_command, [TRAIN, NODES, "--eval"]),
        (plan_memory_command, [TRAIN, NODES, "--shape", "qwen2.5-3b"]),
        (plan_memory_command, [EVAL, NODES, "--shape", "qwen2.5-3b"]),
        (demo_command, [NODES]),
        (train_command, [RLINF, NODES]),
        (check_config_command, [RLINF, NODES]),
        (plan_memory_command, [RLINF, NODES, "--shape", "qwen2.5-3b"]),
    ],
)
def test_several_machines_are_rejected_by_every_command(command, arguments):
    with pytest.raises(UserError, match=r"cluster\.num_nodes: 2 machines are not supported yet.*set it to 1"):
        command([str(argument) for argument in arguments])


def test_several_machines_are_rejected_for_chat():
    args = flags.parser("chat", "").parse_args(["--model_path", "/nowhere", NODES])
    with pytest.raises(UserError, match=r"cluster\.num_nodes: 2 machines"):
        flags.plan_of(args)


def run_of(backend: str = "fsdp", precision: str = "fp16", kl_beta: float = 0.0) -> Config:
    config = Config()
    config.cluster.device = "cpu"
    config.actor.training_backend, config.actor.model.precision = backend, precision
    config.rollout.model.precision = precision
    config.algorithm.kl_beta = kl_beta
    return config


def told(config: Config, for_training: bool = True) -> list[str]:
    return [text for text in warnings(config, for_training) if ".model.precision: " in text]


ALL = {"avx512_bf16", "avx512_fp16"}


@pytest.mark.parametrize(
    ("backend", "kl_beta", "critic", "models"),
    [
        ("fsdp", 0.0, None, "by the actor on fsdp"),
        ("fsdp", 0.1, None, "by the actor and reference model on fsdp"),
        ("megatron", 0.1, None, "by the reference model on fsdp"),
        ("megatron", 0.0, "fsdp", "by the critic on fsdp"),
        ("fsdp", 0.1, "fsdp", "by the actor, critic and reference model on fsdp"),
    ],
)
def test_fp16_that_becomes_bf16_is_named(backend, kl_beta, critic, models, monkeypatch):
    monkeypatch.setattr(searchr1.device, "cpu_flags", lambda: ALL)
    config = run_of(backend, "fp16", kl_beta)
    config.critic.use_critic_model, config.critic.training_backend = critic is not None, critic
    (text,) = told(config)
    assert text.startswith("actor.model.precision: fp16 is computed in bf16")
    assert models in text
    assert "say bf16" in text
    assert told(config, for_training=False) == []


def test_fp16_all_on_megatron_is_as_asked(monkeypatch):
    monkeypatch.setattr(searchr1.device, "cpu_flags", lambda: ALL)
    assert told(run_of("megatron")) == []


@pytest.mark.parametrize(
    ("flags", "precision", "slow"),
    [
        ({"avx2", "avx512f"}, "bf16", True),
        ({"avx512f", "avx512_bf16"}, "bf16", False),
        ({"avx512f", "amx_bf16"}, "bf16", False),
        ({"asimd", "bf16"}, "bf16", False),
        ({"avx512f", "avx512_bf16"}, "fp16", True),
        ({"avx512_fp16"}, "fp16", False),
        ({"avx2"}, "fp32", False),
        (set(), "bf16", False),  # a system that lists none
    ],
)
def test_precisions_that_a_cpu_emulates(flags, precision, slow, monkeypatch):
    monkeypatch.setattr(searchr1.device, "cpu_flags", lambda: flags)
    config = run_of("megatron", precision)
    words = "has no instructions on this CPU and is emulated, slowly; use fp32"
    keys = ["rollout.model.precision", "actor.model.precision"] if slow else []
    assert told(config) == [f"{key}: {precision} {words}" for key in keys]
    assert told(config, for_training=False) == [f"{key}: {precision} {words}" for key in keys[:1]]


def test_fp16_on_fsdp_is_judged_as_the_bf16_that_it_is(monkeypatch):
    monkeypatch.setattr(searchr1.device, "cpu_flags", lambda: {"avx512_fp16"})
    texts = told(run_of("fsdp"))
    assert [text.partition(" ")[0] for text in texts] == ["actor.model.precision:", "actor.model.precision:"]
    assert texts[1].startswith("actor.model.precision: bf16 has no instructions")


def test_bf16_on_an_old_gpu(monkeypatch):
    import torch

    old = Device(kind="cuda", slots=1, cores=1)
    monkeypatch.setattr(check_device, "have_liger", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(Device, "detect", classmethod(lambda cls, setting="auto": old))
    found = {problem.key: problem.message for problem in check_config(run_of("fsdp", "bf16"), for_training=True)}
    assert "compute capability 8.0" in found["rollout.model.precision"]
    assert [text.partition(":")[0] for text in told(run_of("fsdp", "bf16"))] == ["actor.model.precision"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert "rollout.model.precision" not in {p.key for p in check_config(run_of("fsdp", "bf16"), for_training=True)}
    assert told(run_of("fsdp", "bf16")) == []


def test_an_engine_alone_is_judged_alike(monkeypatch):
    import torch

    monkeypatch.setattr(searchr1.device, "cpu_flags", lambda: {"avx2"})
    config = run_of("fsdp", "bf16")
    (text,) = require_precision(config, Device.detect("cpu"))
    assert text.startswith("rollout.model.precision: bf16 has no instructions on this CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    with pytest.raises(UserError, match=r"rollout\.model\.precision: bf16 needs a GPU of compute capability 8\.0"):
        list(require_precision(config, Device(kind="cuda", slots=1, cores=1)))


def test_every_problem_is_named_at_once():
    config = load_config(TRAIN, [NODES, "runner.seq_length=0"])
    assert {"cluster.num_nodes", "runner.seq_length"} <= {p.key for p in check_config(config, for_training=True)}


def on_gpu(monkeypatch, has_liger):
    import torch

    gpu = Device(kind="cuda", slots=8, cores=8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(Device, "detect", classmethod(lambda cls, setting="auto": gpu))
    monkeypatch.setattr(check_device, "have_liger", lambda: has_liger)


@pytest.mark.parametrize(
    ("backend", "liger", "compiled", "has_liger", "warned"),
    [
        ("fsdp", None, False, False, True),
        ("fsdp", None, False, True, False),
        ("fsdp", None, True, False, False),
        ("fsdp", False, False, False, False),
        ("megatron", None, False, False, False),
    ],
)
def test_operations_that_are_not_fused_are_named(backend, liger, compiled, has_liger, warned, monkeypatch):
    on_gpu(monkeypatch, has_liger)
    config = run_of(backend, "bf16")
    config.actor.fsdp.liger, config.actor.fsdp.compile = liger, compiled
    assert any(text.startswith("actor.fsdp.liger:") for text in warnings(config)) == warned


@pytest.mark.parametrize("has_gpu", [True, False])
def test_kernels_that_cannot_run_here_are_rejected(has_gpu, monkeypatch):
    if has_gpu:
        on_gpu(monkeypatch, has_liger=False)
    config = run_of("fsdp", "bf16")
    config.actor.fsdp.liger = config.actor.fsdp.compile = True
    found = {problem.key: problem.message for problem in check_config(config, for_training=True) if "fsdp." in problem.key}
    if has_gpu:
        assert list(found) == ["actor.fsdp.liger"]
        assert "not installed" in found["actor.fsdp.liger"]
    else:
        assert found == dict.fromkeys(("actor.fsdp.liger", "actor.fsdp.compile"), "needs a GPU; leave the key out")
