"""What needs an engine of its own, in a process of its own: dummy weights, a full cache, incomplete updates."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from searchr1.device import Device

SCRIPT = """
import asyncio, sys
import torch
from transformers import Qwen2ForCausalLM
from searchr1.agent.settings import GenerateParams
from searchr1.device import Device
from searchr1.rollout.engine import Engine, EngineError
from searchr1.rollout.settings import EngineSettings
from searchr1.rollout.weights import WeightPublisher

async def main(model_path, directory):
    settings = EngineSettings(
        max_model_len=128, kv_cache_memory_gb=0.0005, load_format="dummy", detokenize=False,
        tensor_parallel_size=int(sys.argv[3]),
    )
    engine = await Engine.start(model_path, Device.detect("cpu"), settings)
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    ids = list(range(3, 63))
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    async def difference():  # from `expected` as it is at the time
        scored, = await engine.logprobs([ids])
        return float((torch.tensor(scored[1:]) - expected).abs().max())

    publisher = WeightPublisher(directory, 50_000)

    async def update(named, version):
        for bucket in publisher.publish(named, version, sum(p.numel() for _, p in named)):
            await engine.update_weights(bucket)
        publisher.release()

    assert await difference() > 0.1
    await update(list(model.named_parameters()), 1)
    assert await difference() < 1e-4
    # Again through the same buffers, whose files have no names any more.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert await difference() > 1e-3
    await update(list(model.named_parameters()), 1)
    assert await difference() < 1e-4
    answer = await engine.generate(ids, GenerateParams(max_new_tokens=3, min_new_tokens=3))
    assert len(answer.token_ids) == 3 and answer.text == "" and answer.weight_version == 1
    await engine.sleep()
    await engine.wake()

    # The cache holds 1,000 tokens: 24 requests of 100 push each other out, and must give what they give alone.
    prompts = [[3 + (i * j) % 290 for j in range(1, 51)] for i in range(1, 25)]
    params = [GenerateParams(max_new_tokens=50, min_new_tokens=50, seed=i) for i in range(24)]
    together = await asyncio.gather(*(engine.generate(p, q) for p, q in zip(prompts, params, strict=True)))
    for i in range(0, 24, 4):
        assert (await engine.generate(prompts[i], params[i])).token_ids == together[i].token_ids

    half = [(n, p) for n, p in model.named_parameters() if "layers.1." not in n]
    try:
        await update(half, 2)
    except EngineError as error:
        print("UPDATE", error)
    try:
        await engine.generate(ids, GenerateParams(max_new_tokens=3))
    except EngineError as error:
        print("GENERATE", error)
    await engine.close()

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


def run_script(model_path: Path, tmp_path: Path, tensor_parallel: int) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    environment = os.environ | Device.detect("cpu").worker_env("rollout", workers=tensor_parallel)
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, str(script), str(model_path), str(tmp_path / "weights"), str(tensor_parallel)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return [line for line in result.stdout.splitlines() if line.startswith(("UPDATE", "GENERATE"))]


@pytest.mark.slow
def test_two_tensor_parallel_processes_follow_an_update(model_path: Path, tmp_path: Path) -> None:
    update, _ = run_script(model_path, tmp_path, tensor_parallel=2)
    assert "layers.1." in update


def test_dummy_start_then_update_and_an_incomplete_update_stops_the_engine(model_path: Path, tmp_path: Path) -> None:
    update, generate = run_script(model_path, tmp_path, tensor_parallel=1)
    for line in (update, generate):
        assert "left" in line
        assert "layers.1." in line
