"""LoRA adapters on their way to the engine; it needs an engine of its own, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from searchr1.device import Device
from searchr1.rollout.weights import publish_adapter, release

SCRIPT = """
import asyncio, sys
import torch
from transformers import Qwen2ForCausalLM
from searchr1.learner.lora import add_adapters, full_adapters, full_weights
from searchr1.checkpoints.lora import is_adapter, peft_settings
from searchr1.agent.settings import GenerateParams
from searchr1.config.schema_model import LoraConfig
from searchr1.device import Device
from searchr1.rollout.engine import Engine
from searchr1.rollout.settings import EngineSettings
from searchr1.rollout.weights import publish_adapter, release

IDS = list(range(3, 103))

def scores(model, ids):
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

async def main(path, directory):
    engine = await Engine.start(path, Device.detect("cpu"), EngineSettings(
        max_model_len=512, kv_cache_memory_gb=0.05, adapter_rank=4, detokenize=False))
    lora = LoraConfig(rank=4, alpha=6.0)
    model, merged = (Qwen2ForCausalLM.from_pretrained(path) for _ in range(2))
    base = scores(merged, IDS)
    add_adapters(model, lora)

    async def difference(expected):
        scored, = await engine.logprobs([IDS])
        return float((torch.tensor(scored[1:]) - expected).abs().max())

    async def update(version, scale):
        torch.manual_seed(version)
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.data.normal_(0, scale)
        manifest = publish_adapter(full_adapters(model), version, directory,
                                   peft_settings(lora.rank, lora.alpha, lora.target_modules))
        await engine.update_weights(manifest)
        release(manifest)
        merged.load_state_dict(dict(full_weights(model)), strict=False)

    assert await difference(base) < 1e-4
    greedy = GenerateParams(max_new_tokens=4, temperature=0.0)
    for version in (1, 2, 3):
        await update(version, 0.1)
        assert engine.weight_version == version
        assert float((scores(merged, IDS) - base).abs().max()) > 0.1
        assert await difference(scores(model, IDS)) < 1e-4
        assert await difference(scores(merged, IDS)) < 1e-4
        answer = await engine.generate(IDS, greedy)  # a stale prefix cache would show
        ids = IDS + answer.token_ids
        assert torch.allclose(torch.tensor(answer.logprobs), scores(merged, ids)[len(IDS) - 1:], atol=1e-4)

    # A request that runs goes on with the new adapter.
    params = GenerateParams(max_new_tokens=200, min_new_tokens=200, seed=1)
    task = asyncio.create_task(engine.generate(IDS, params))
    steps = engine.stats().steps
    while engine.stats().steps < steps + 20:
        await asyncio.sleep(0.001)
    old = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    await update(4, 0.2)
    assert not task.done()
    answer = await task
    ids, found = IDS + answer.token_ids, torch.tensor(answer.logprobs)
    new_fits = (found - never_ends(merged, ids)).abs() < 1e-4
    merged.load_state_dict(old)
    old_fits = (found - never_ends(merged, ids)).abs() < 1e-4
    switch = int(old_fits.int().cumprod(0).sum())
    assert 0 < switch < 200 and new_fits[switch:].all(), (switch, new_fits)
    await engine.close()
    print("FINE")

def never_ends(model, ids):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    logits[:, model.config.eos_token_id] = float("-inf")
    scores = logits.log_softmax(-1)
    return scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[len(IDS) - 1:, 0]

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_adapters_give_the_log_probabilities_of_merged_weights(model_path: Path, tmp_path: Path) -> None:
    environment = os.environ | Device.detect("cpu").worker_env("rollout")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model_path), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "FINE" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_published_adapter_is_a_folder_as_peft_writes_it_until_its_release(tmp_path: Path) -> None:
    named = {"base_model.model.q.lora_A.weight": torch.ones(2, 3), "base_model.model.q.lora_B.weight": torch.zeros(5, 2)}
    manifest = publish_adapter(named.items(), 7, tmp_path, {"r": 2, "lora_alpha": 4.0})
    folder = Path(manifest.directory)
    assert (manifest.version, manifest.adapter, manifest.first, manifest.last) == (7, True, True, True)
    assert json.loads((folder / "adapter_config.json").read_text()) == {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0}
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == named.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in named.items())
    release(manifest)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="at least one tensor"):
        publish_adapter([], 8, tmp_path, {})
