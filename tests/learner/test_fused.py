"""Fused kernels and compiled layers against transformers' own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.models import make_model

from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.learner import fused

CPU, GPU = Device("cpu", 2, 2), Device("cuda", 8, 8)

TRY = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from support.trajectories import random_trajectories
from searchr1.learner import fused
from searchr1.learner.model import init_process_group, policy_logprobs, shard_model
from searchr1.learner.packing import pack
from searchr1.device import Device

CPU, kind, folder = Device.detect("cpu"), sys.argv[1], sys.argv[2]
init_process_group(CPU)
if kind == "liger":  # Triton's interpreter has neither numbers with methods nor CUDA's own functions
    import triton
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    class Number(float):
        def to(self, dtype):
            return self

    @triton.jit
    def rsqrt(x):
        return 1.0 / tl.sqrt(x)

    convert = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda value: Number(value) if isinstance(value, float) else convert(value)
    rms_norm.rsqrt = rsqrt


def run(change):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="searchr1_packed")
    change(model)
    model = shard_model(model, CPU, gradient_checkpointing=kind == "compile")
    logprobs = []
    for seed, count in enumerate((1, 2) if kind == "liger" else (1, 2, 5, 7)):  # sequences in a row
        for batch in pack(random_trajectories(seed, count)[0], 400):
            logprobs.append(policy_logprobs(model, batch, 1.0).logprobs_M)
            logprobs[-1].sum().backward()
    return torch.cat(logprobs).detach(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


values, gradients = run(lambda model: None)
change = fused.apply_liger if kind == "liger" else lambda m: fused.compile_layers(m.model.layers, "aot_eager")
changed, changed_gradients = run(change)
from torch._dynamo.utils import counters
print(json.dumps({
    "values": float((values - changed).abs().max()),
    "gradients": max(float((changed_gradients[n] - g).norm() / g.norm()) for n, g in gradients.items()),
    "graphs": counters["stats"]["unique_graphs"],
}))
"""


def run(kind: str, family: str, folder) -> dict:
    make_model(family, True, folder, num_hidden_layers=2)
    env = os.environ | {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TRY, kind, str(folder)]
    if kind == "liger":  # Triton reads functions' sources
        (folder / "attempt.py").write_text(TRY)
        command = [sys.executable, str(folder / "attempt.py"), kind, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow  # Triton's kernels are interpreted: half a minute a family
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", fused.LIGER_FAMILIES)
def test_ligers_kernels_give_the_log_probabilities_and_gradients_of_transformers(tmp_path, family):
    found = run("liger", family, tmp_path / "model")
    assert found["values"] < 2e-5
    assert found["gradients"] < 1e-4
    assert found["values"] > 0  # other kernels, other rounding: they did run


@pytest.mark.slow  # compiling takes half a minute
@pytest.mark.timeout(600)
def test_compiled_layers_give_the_same_and_are_compiled_once_for_all_lengths(tmp_path):
    found = run("compile", "qwen3", tmp_path / "model")
    assert found["values"] < 2e-5
    assert found["gradients"] < 1e-4
    # Four pieces of a layer (norm; projections and rotation; output projection; the rest), some of them twice: the first
    # layer's input is no result of another.
    assert 3 <= found["graphs"] <= 8


class Model:
    class config:
        model_type = "qwen2"


@pytest.mark.parametrize(
    ("asked", "device", "installed", "family", "expected"),
    [
        (None, GPU, True, "qwen2", True),
        (True, GPU, True, "llama", True),
        (False, GPU, True, "qwen2", False),
        (None, CPU, True, "qwen2", False),
        (None, GPU, False, "qwen2", False),
        (None, GPU, True, "gemma3", False),
        (True, CPU, True, "qwen2", "need a GPU"),
        (True, GPU, False, "qwen2", "not installed"),
        (True, GPU, True, "gemma3", "gemma3"),
    ],
)
def test_liger_is_taken_where_it_can_be_and_its_absence_is_printed(
    monkeypatch, capsys, asked, device, installed, family, expected
):
    applied = []
    monkeypatch.setattr(fused, "apply_liger", applied.append)
    monkeypatch.setattr(fused, "have_liger", lambda: installed)
    model = Model()
    monkeypatch.setattr(Model.config, "model_type", family)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"actor.fsdp.liger: .*{expected}"):
            fused.use_liger(model, device, asked)
        return
    assert fused.use_liger(model, device, asked) is expected
    assert applied == [model] * expected
    printed = capsys.readouterr().out
    assert ("Liger" in printed) == expected
    assert ("not fused" in printed) == (device is GPU and asked is None and not expected)


def test_compiling_is_rejected_where_it_would_do_nothing(monkeypatch):
    with pytest.raises(UserError, match=r"actor.fsdp.compile: needs a GPU"):
        fused.use_compile([], CPU)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(UserError, match=r"actor.fsdp.compile: torch.compile is switched off"):
        fused.use_compile([], GPU)
