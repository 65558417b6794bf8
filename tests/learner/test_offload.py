"""Tensors that leave their memory and come back."""

from __future__ import annotations

import pytest
import torch
from support import policy_ranks as ranks
from support.models import make_model

from searchr1.learner.fsdp import FsdpTraining
from searchr1.learner.offload import Offload


def test_views_parameters_and_contents_survive():
    flat = torch.arange(12.0)
    parameter = torch.nn.Parameter(flat[4:8].view(2, 2))
    moments = torch.randn(3, 5).to(torch.bfloat16)
    before = flat.clone(), moments.clone()
    offload = Offload(lambda: [flat, parameter, moments, torch.empty(0)])
    for _ in range(2):
        assert offload.out() == flat.nbytes + moments.nbytes
        assert offload.is_out
        assert flat.untyped_storage().nbytes() == moments.untyped_storage().nbytes() == 0
        assert offload.out() == 0
        offload.back()
        offload.back()
        assert torch.equal(flat, before[0])
        assert torch.equal(moments, before[1])
        assert torch.equal(parameter, before[0][4:8].view(2, 2))
    with torch.no_grad():
        parameter.fill_(7)
    assert flat[5] == 7


def test_what_is_not_kept_comes_back_as_zeros():
    gradients = torch.ones(5)
    offload = Offload(lambda: [gradients], keep=False)
    offload.out()
    offload.back()
    assert torch.equal(gradients, torch.zeros(5))


def test_what_fsdp_keeps_in_host_memory_anyway_is_not_copied_there():
    backend = FsdpTraining.__new__(FsdpTraining)
    backend.model = torch.nn.Linear(3, 3)
    backend.optimizer = torch.optim.AdamW(backend.model.parameters())
    backend.model(torch.ones(3)).sum().backward()
    backend.optimizer.step()
    for device, counts in (("cpu", [2, 4]), ("cuda", [0, 0])):
        backend.device = torch.device(device)
        assert [len(list(backend.resident(kind))) for kind in ("weight", "optimizer")] == counts


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    model = str(make_model("qwen2", True, folder / "model"))
    jobs = []
    for backend, precision in (("fsdp", "fp32"), ("megatron", "fp32"), ("megatron", "bf16")):
        name, checkpoint = f"{backend}-{precision}", folder / f"{backend}-{precision}"
        checkpoint.mkdir()
        (checkpoint / "sizes.json").write_text("{}")  # the runner's
        job = {"model": model, "backend": backend, "precision": precision}
        jobs += [
            job | {"name": f"{name}-plain"},
            job | {"name": f"{name}-saved", "offload": True, "steps": (0, 3), "save": f"{checkpoint}/actor"},
            job | {"name": f"{name}-resumed", "offload": True, "steps": (3, 5), "load": f"{checkpoint}/actor"},
        ]
    return ranks.run(1, jobs, folder / "out")


@pytest.mark.parametrize("kind", ["fsdp-fp32", "megatron-fp32", "megatron-bf16"])
def test_training_saving_and_resuming_with_everything_offloaded_in_between_is_the_same(runs, kind):
    """A checkpoint is written and read when weights, gradients and optimizer state are all out."""
    plain, offloaded = runs[f"{kind}-plain"][0], runs[f"{kind}-resumed"][0]
    for name, weight in plain["weights"].items():
        assert torch.equal(weight, offloaded["weights"][name]), name
    assert offloaded["freed"]["optimizer"] > 2 * 4 * sum(weight.numel() for weight in plain["weights"].values()) * 0.99
