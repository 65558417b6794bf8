"""Models of which each rank reads its own rows: the same, bit by bit, as transformers' own loading of the whole model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import loading_memory, loading_ranks
from support import policy_ranks as ranks
from support.models import make_model
from transformers import AutoModelForCausalLM

from searchr1.errors import UserError
from searchr1.learner import model as loading

LORA = {"rank": 4, "target_modules": ["q_proj", "down_proj"]}
ODD = {"vocab_size": 301, "intermediate_size": 97}
"""Rows that two ranks cannot share out evenly."""


def sharded_index(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{number % 3 + 1}-of-00003.safetensors" for number, name in enumerate(weights)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_copy_of_tied_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


FOLDERS: dict[str, tuple[str, bool, dict[str, Any], Any]] = {
    "tied": ("qwen2", True, ODD, None),
    "tied-copy": ("qwen2", True, {}, with_copy_of_tied_layer),
    "untied": ("qwen3", False, {"num_hidden_layers": 1}, sharded_index),
    "bf16": ("llama", False, ODD | {"dtype": torch.bfloat16}, None),
    "fp16": ("mistral", False, {"dtype": torch.float16}, None),
    "gemma": ("gemma", True, {"dtype": torch.bfloat16}, None),
    "gemma3": ("gemma3_text", True, {}, None),
    "bin": ("qwen2", False, ODD, pickled),
    "experts": ("qwen3_moe", False, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, None),
}
JOBS: list[dict[str, Any]] = [
    *({"model": name, "name": f"loading-{name}"} for name in FOLDERS if name != "experts"),
    {"model": "experts", "name": "loading-experts", "reference": True},
    {"model": "bf16", "name": "loading-computed-in-bf16", "precision": "bf16"},
    {"model": "tied", "name": "loading-reference", "reference": True},
    {"model": "tied", "name": "loading-lora", "lora": LORA},
    {"model": "bf16", "name": "loading-lora-on-bf16", "lora": LORA | {"base_precision": "compute"}, "precision": "bf16"},
    {
        "model": "untied",
        "name": "loading-lora-on-the-output-layer",
        "lora": LORA | {"target_modules": ["lm_head", "v_proj"]},
    },
    {"model": "tied", "name": "loading-cpu-offload", "cpu_offload": True},
    {"model": "tied", "name": "loading-critic", "critic": True},
    {"model": "bf16", "name": "loading-critic-of-bf16", "critic": True},
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("models")
    for name, (family, tied, changes, change) in FOLDERS.items():
        make_model(family, tied, root / name, **changes)
        if change is not None:
            change(root / name)
    return [job | {"model": str(root / job["model"])} for job in JOBS]


@pytest.mark.parametrize("number", range(len(JOBS)), ids=[job["name"].removeprefix("loading-") for job in JOBS])
def test_one_rank_holds_and_computes_the_same(jobs, number):
    assert loading_ranks.differences(jobs[number]) == []


def test_two_ranks_hold_and_compute_the_same(jobs, tmp_path):
    torch.manual_seed(0)
    save_file(loading_ranks.Small().state_dict(), tmp_path / "model.safetensors")
    found = ranks.run(2, [*jobs, {"name": "loading-small", "model": str(tmp_path)}], tmp_path)
    assert {name: differences for name, differences in found.items() if any(differences)} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tied", "bf16", "gemma", "cpu-offload", "computed-in-bf16", "reference", "critic"])
def test_one_gpu_holds_and_computes_the_same(jobs, name):
    job = next(job for job in jobs if job["name"] == f"loading-{name}") | {"device": "cuda"}
    code = (
        "import json, sys; from support.loading_ranks import differences; "
        "print(json.dumps(differences(json.loads(sys.argv[1]))))"
    )
    # A process of its own: a process group is for one device.
    command = [sys.executable, "-c", code, json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


BF16: dict[str, Any] = {"dtype": torch.bfloat16, "attention": "sdpa"}


def test_a_hub_name_is_read_by_rows_from_its_snapshot(jobs, monkeypatch):
    snapshot = Path(jobs[0]["model"])
    monkeypatch.setattr(loading, "local_folder", {"org/name": snapshot}.get)
    model, folder = loading.build_model(AutoModelForCausalLM, "org/name", **BF16)
    assert folder == snapshot
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    monkeypatch.setattr(loading, "local_folder", {"org/other": snapshot.parent}.get)
    monkeypatch.setattr(loading, "has_weights", lambda folder: True)
    with pytest.raises(UserError, match=r"has no config\.json"):
        loading.build_model(AutoModelForCausalLM, "org/other", **BF16)


def test_what_every_rank_must_load_whole_says_so_and_why(jobs, tmp_path, monkeypatch, caplog):
    experts = next(job["model"] for job in jobs if job["name"] == "loading-experts")
    model, folder = loading.build_model(AutoModelForCausalLM, experts, **BF16)
    assert folder is None
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert "every rank loads the whole model" in caplog.text
    assert "because transformers renames or fuses the tensors of a qwen3_moe" in caplog.text

    asked = []

    def whole(kind, path, **settings):
        asked.append(path)
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr(loading, "local_folder", lambda source: tmp_path)  # a snapshot without safetensors
    monkeypatch.setattr(loading, "load_pretrained", whole)
    assert loading.build_model(AutoModelForCausalLM, "org/name", **BF16)[1] is None
    assert asked == ["org/name"]
    assert "because it has no safetensors files" in caplog.text


@pytest.mark.slow  # processes of their own, whose memory nothing else has grown
def test_a_rank_of_two_has_room_for_half_the_model(tmp_path):
    """Of 248 million parameters: 496 MB of fp32 for each rank, where transformers takes 992 and the pages of the file."""
    parameters = loading_memory.make_folder(tmp_path)
    for how in ("rows", "megatron"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        commands = [[sys.executable, loading_memory.__file__, how, tmp_path, str(rank), "2", str(port)] for rank in (0, 1)]
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for command in commands]
        for process in started:
            found = json.loads(process.communicate(timeout=300)[0].splitlines()[-1])
            assert abs(found["held"] - 2 * parameters) < 1e6, (
                how
            )  # half of them, 4 bytes each; norms are not cut by Megatron
            # What has been read and not yet copied: at most 64 MiB, or Megatron's part of the embedding in bf16.
            assert found["grown"] - found["held"] < 120e6, (how, found)
