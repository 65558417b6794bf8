"""Loading published weights into a running engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from searchr1.agent.settings import GenerateParams
from searchr1.rollout.engine import Engine, EngineError
from searchr1.rollout.weights import WeightPublisher

PROBES = [[5, 9, 200, 31, 7, 44, 120], list(range(3, 103))]


def expected_logprobs(model: Qwen2ForCausalLM, ids: list[int], never: int | None = None) -> torch.Tensor:
    """[len(ids) - 1] log-probabilities; token `never` cannot be sampled (`min_new_tokens` forbids the end)."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    if never is not None:
        logits[:, never] = float("-inf")
    scores = logits.log_softmax(-1)
    return scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def worst_difference(engine: Engine, model: Qwen2ForCausalLM, run: Any) -> float:
    scored = run(engine.logprobs(PROBES))
    return max(
        float((torch.tensor(scores[1:]) - expected_logprobs(model, ids)).abs().max())
        for ids, scores in zip(PROBES, scored, strict=True)
    )


async def send(engine: Engine, publisher: WeightPublisher, named: Iterable[tuple[str, Tensor]], version: int) -> int:
    """All buckets, the next one written before one is read; returns how many.

    What has been read is overwritten with NaN at once, as a trainer in a hurry would with other weights.
    """
    named = list(named)
    buckets = publisher.publish(named, version, sum(tensor.numel() for _, tensor in named))
    bucket, count = next(buckets), 1
    while True:
        following = None if bucket.last else next(buckets)
        await engine.update_weights(bucket)
        buffer = publisher._buffers[(count - 1) % 2]
        buffer.view(torch.uint8, 0, buffer.size).fill_(255)
        if following is None:
            break
        bucket, count = following, count + 1
    publisher.release()
    return count


def load(engine: Engine, model: Qwen2ForCausalLM, version: int, directory: Path, run: Any) -> None:
    publisher = WeightPublisher(directory, 100_000)
    run(send(engine, publisher, model.named_parameters(), version))
    publisher.close()


@pytest.fixture
def restored(engine: Engine, model_path: Path, tmp_path: Path, run: Any) -> Any:
    """The engine; its first weights come back afterwards."""
    yield engine
    load(engine, Qwen2ForCausalLM.from_pretrained(model_path), 0, tmp_path, run)


def test_engine_follows_ten_updates_of_a_tied_model(restored: Engine, model_path: Path, tmp_path: Path, run: Any) -> None:
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    assert model.config.tie_word_embeddings
    assert worst_difference(restored, model, run) < 1e-4
    # A prompt that stays the same, so that a stale prefix cache would show.
    prompt = PROBES[1]
    greedy = GenerateParams(max_new_tokens=4, temperature=0.0)
    generator = torch.Generator().manual_seed(1)
    for version in range(1, 11):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        load(restored, model, version, tmp_path, run)
        assert restored.weight_version == version
        assert worst_difference(restored, model, run) < 1e-4
        generation = run(restored.generate(prompt, greedy))
        assert generation.weight_version == version
        ids = prompt + generation.token_ids
        expected = expected_logprobs(model, ids)[len(prompt) - 1 :]
        assert torch.allclose(torch.tensor(generation.logprobs), expected, atol=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_an_update_in_mid_flight_loses_and_changes_nothing_it_should_not(
    restored: Engine, model_path: Path, tmp_path: Path, run: Any, until: Any
) -> None:
    """The same weights loaded again while 32 requests run: same tokens as undisturbed, seeds included."""
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    load(restored, model, 7, tmp_path, run)
    prompts = [[3 + (i * j) % 290 for j in range(1, 40 + i)] for i in range(1, 33)]
    params = [GenerateParams(max_new_tokens=120, min_new_tokens=120, seed=i) for i in range(32)]

    async def generate(update: bool) -> list[Any]:
        tasks = [asyncio.create_task(restored.generate(p, q)) for p, q in zip(prompts, params, strict=True)]
        if update:
            for _ in range(2):
                steps = restored.stats().steps
                await until(lambda seen=steps: restored.stats().steps >= seen + 15)
                await send(restored, WeightPublisher(tmp_path, 1 << 20), model.named_parameters(), 8)
        assert not (update and all(task.done() for task in tasks))
        return await asyncio.gather(*tasks)

    undisturbed = run(generate(update=False))
    disturbed = run(generate(update=True))
    assert restored.weight_version == 8
    for one, other in zip(undisturbed, disturbed, strict=True):
        assert one.token_ids == other.token_ids
        assert torch.allclose(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4)
        assert other.weight_version == 7


def test_a_mid_flight_update_takes_effect_at_once(
    restored: Engine, model_path: Path, tmp_path: Path, run: Any, until: Any
) -> None:
    old = Qwen2ForCausalLM.from_pretrained(model_path)
    new = Qwen2ForCausalLM.from_pretrained(model_path)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    prompt = PROBES[1]

    async def generate() -> Any:
        params = GenerateParams(max_new_tokens=150, min_new_tokens=150, seed=1)
        task = asyncio.create_task(restored.generate(prompt, params))
        steps = restored.stats().steps
        await until(lambda: restored.stats().steps >= steps + 20)
        await send(restored, WeightPublisher(tmp_path, 1 << 20), new.named_parameters(), 1)
        return await task

    generation = run(generate())
    ids = prompt + generation.token_ids
    actual = torch.tensor(generation.logprobs)
    # The first tokens fit the old weights and the last ones the new; somewhere between is one switch.
    eos = old.config.eos_token_id
    fits_old = (actual - expected_logprobs(old, ids, never=eos)[len(prompt) - 1 :]).abs() < 1e-4
    fits_new = (actual - expected_logprobs(new, ids, never=eos)[len(prompt) - 1 :]).abs() < 1e-4
    switch = int(fits_new.nonzero()[0])
    assert 15 <= switch < 150
    assert bool(fits_old[:switch].all())
    assert bool(fits_new[switch:].all())


def test_an_update_in_buckets_is_one_update(
    restored: Engine, model_path: Path, tmp_path: Path, run: Any, until: Any
) -> None:
    """Requests wait from the first bucket to the last; no more than two buckets exist at any time."""
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    elements = sum(parameter.numel() for parameter in model.parameters())
    updates = restored.stats().weight_updates

    async def watched() -> int:
        publisher = WeightPublisher(tmp_path, 50_000)
        buckets = publisher.publish(model.named_parameters(), 9, elements)
        params = GenerateParams(max_new_tokens=100, min_new_tokens=100, seed=1)
        task = asyncio.create_task(restored.generate(PROBES[1], params))
        steps = restored.stats().steps
        await until(lambda: restored.stats().steps >= steps + 10)
        bucket, count = next(buckets), 1
        assert bucket.first
        while not bucket.last:
            following = next(buckets)
            assert [path.stat().st_size for path in Path(bucket.directory).glob("bucket-*")] == [50_000] * 2
            await restored.update_weights(bucket)
            seen = restored.stats().steps
            await asyncio.sleep(0.05)
            assert restored.stats().steps == seen
            assert restored.weight_version != 9
            bucket, count = following, count + 1
        await restored.update_weights(bucket)
        publisher.release()
        await task
        return count

    assert run(watched()) > 3
    assert restored.weight_version == 9
    assert restored.stats().weight_updates == updates + 1
    assert worst_difference(restored, model, run) < 1e-4
    assert list(tmp_path.iterdir()) == []


def test_the_engine_computes_with_exactly_the_published_numbers(
    restored: Engine, model_path: Path, tmp_path: Path, run: Any
) -> None:
    """However the weights are cut (within tensors, within a layer that vLLM loads as one), and in either precision."""
    first = Qwen2ForCausalLM.from_pretrained(model_path)
    other = Qwen2ForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6))
    scores: dict[tuple[int, torch.dtype], set[tuple[Any, ...]]] = {}
    for size, dtype in (
        (1 << 20, torch.float32),
        (1 << 20, torch.bfloat16),
        (30_000, torch.float32),
        (7_002, torch.bfloat16),
    ):
        publisher = WeightPublisher(tmp_path, size)
        for number, model in enumerate((first, other, first)):  # through the same two buffers
            named = [(name, tensor.detach().to(dtype)) for name, tensor in model.named_parameters()]
            count = run(send(restored, publisher, named, number))
            assert (count > 10) == (size < 1 << 20)
            found = tuple(tuple(one) for one in run(restored.logprobs(PROBES)))
            scores.setdefault((number % 2, dtype), set()).add(found)
        publisher.close()
    assert [len(found) for found in scores.values()] == [1] * 4
    assert len(set().union(*scores.values())) == 4


def test_an_update_that_names_missing_files_leaves_the_engine_running(
    engine: Engine, model_path: Path, tmp_path: Path, run: Any
) -> None:
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    publisher = WeightPublisher(tmp_path, 1 << 20)
    manifest = next(publisher.publish(model.named_parameters(), 3, sum(p.numel() for p in model.parameters())))
    publisher.release()
    version = engine.weight_version
    with pytest.raises(EngineError, match="version 3 are gone"):
        run(engine.update_weights(manifest))
    assert engine.weight_version == version
    assert worst_difference(engine, model, run) < 1e-4
