"""The engine against transformers, against itself under load, and what it does with bad requests."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from searchr1.agent.settings import GenerateParams, Generation
from searchr1.rollout.engine import Engine, EngineError, EngineTimeout

VOCAB = 300


def random_prompts(count: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


def reference_logprobs(model: Qwen2ForCausalLM, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """[len(ids)] log-probability of each token given those before; 0 for the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float() / temperature
    scores = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return torch.cat([torch.zeros(1), scores])


async def generate_all(engine: Engine, prompts: list[list[int]], params: list[GenerateParams]) -> list[Generation]:
    return list(await asyncio.gather(*(engine.generate(prompt, p) for prompt, p in zip(prompts, params, strict=True))))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_sampling_distribution(
    engine: Engine, model_path: Path, run: Any, temperature: float
) -> None:
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    prompts = random_prompts(8, 5, 200)
    params = [GenerateParams(max_new_tokens=20, temperature=temperature, seed=i) for i in range(8)]
    for prompt, generation in zip(prompts, run(generate_all(engine, prompts, params)), strict=True):
        assert len(generation.logprobs) == len(generation.token_ids) > 0
        expected = reference_logprobs(model, prompt + generation.token_ids, temperature)[len(prompt) :]
        assert torch.allclose(torch.tensor(generation.logprobs), expected, atol=1e-4)


def test_top_k_and_top_p_cut_the_distribution(engine: Engine, model_path: Path, run: Any) -> None:
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    prompt = random_prompts(1, 30, 30)[0]
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    best = probabilities.topk(3)
    params = [GenerateParams(max_new_tokens=1, top_k=3, seed=seed) for seed in range(40)]
    generations = run(generate_all(engine, [prompt] * 40, params))
    assert {g.token_ids[0] for g in generations} == set(best.indices.tolist())
    for generation in generations:
        expected = (probabilities[generation.token_ids[0]] / best.values.sum()).log().item()
        assert generation.logprobs[0] == pytest.approx(expected, abs=1e-4)
    off = [GenerateParams(max_new_tokens=4, top_k=k, seed=7) for k in (-1, 1_000_000)]
    one, other = run(generate_all(engine, [prompt] * 2, off))
    assert one.token_ids == other.token_ids
    assert one.logprobs == other.logprobs


def test_greedy_takes_the_best_token(engine: Engine, model_path: Path, run: Any) -> None:
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    prompt = random_prompts(1, 50, 50, seed=3)[0]
    generation = run(engine.generate(prompt, GenerateParams(max_new_tokens=12, temperature=0.0)))
    ids = prompt + generation.token_ids
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert generation.token_ids == best[len(prompt) - 1 : -1]
    expected = reference_logprobs(model, ids)[len(prompt) :]
    assert torch.allclose(torch.tensor(generation.logprobs), expected, atol=1e-4)


def test_seeded_samples_do_not_depend_on_company(engine: Engine, run: Any) -> None:
    """128 at once over a warm prefix cache give exactly what each gives alone, whatever their order."""
    prompts = random_prompts(64, 20, 400)
    prompts += [[*prompt[: len(prompt) // 2], 5, 6, 7] for prompt in prompts]  # share half of another's prefix
    params = [GenerateParams(max_new_tokens=32, seed=1000 + i) for i in range(128)]
    run(engine.reset_prefix_cache())
    together = run(generate_all(engine, prompts, params))
    order = random.Random(1).sample(range(128), 128)
    shuffled = run(generate_all(engine, [prompts[i] for i in order], [params[i] for i in order]))
    for position, i in enumerate(order):
        assert shuffled[position].token_ids == together[i].token_ids
    for i in range(0, 128, 9):
        alone = run(engine.generate(prompts[i], params[i]))
        assert alone.token_ids == together[i].token_ids
        assert torch.allclose(torch.tensor(alone.logprobs), torch.tensor(together[i].logprobs), atol=1e-5)
    other_seeds = [GenerateParams(max_new_tokens=32, seed=9000 + i) for i in range(128)]
    different = run(generate_all(engine, prompts, other_seeds))
    assert sum(a.token_ids == b.token_ids for a, b in zip(different, together, strict=True)) == 0


def test_prefix_cache_is_used_and_counted(engine: Engine, run: Any) -> None:
    prompt = random_prompts(1, 256, 256, seed=11)[0]
    params = GenerateParams(max_new_tokens=2, seed=1)
    run(engine.reset_prefix_cache())
    before = engine.stats()
    run(engine.generate(prompt, params))
    first = engine.stats()
    assert first.cached_prompt_tokens == before.cached_prompt_tokens
    run(engine.generate(prompt, params))
    second = engine.stats()
    assert second.cached_prompt_tokens - first.cached_prompt_tokens >= 192
    assert 0 < second.prefix_cache_hit_rate < 1
    assert second.generated_tokens - before.generated_tokens == 4
    assert second.prompt_tokens - before.prompt_tokens == 512
    assert second.busy_seconds > before.busy_seconds
    assert second.steps > before.steps
    assert second.running == 0


def test_stop_strings_end_the_text_but_never_split_a_token(engine: Engine, model_path: Path, run: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompt = random_prompts(1, 40, 40, seed=5)[0]
    free = run(engine.generate(prompt, GenerateParams(max_new_tokens=60, seed=3)))
    # A stop string of two characters from the middle of the text; where it first occurs is where the text must end.
    text = free.text
    stop = next(text[i : i + 2] for i in range(len(text) // 2, len(text)) if text[i : i + 2].isascii())
    generation = run(engine.generate(prompt, GenerateParams(max_new_tokens=60, seed=3, stop=(stop, "</search>"))))
    assert generation.finish_reason == "stop"
    assert generation.text == text[: text.index(stop) + len(stop)]
    count = len(generation.token_ids)
    assert generation.token_ids == free.token_ids[:count]
    assert len(generation.logprobs) == count
    assert stop in tokenizer.decode(generation.token_ids)
    assert stop not in tokenizer.decode(generation.token_ids[:-1])


def test_length_and_eos_finish_reasons(engine: Engine, model_path: Path, run: Any) -> None:
    eos = AutoTokenizer.from_pretrained(model_path).eos_token_id
    prompts = random_prompts(60, 10, 20, seed=6)
    params = [GenerateParams(max_new_tokens=100, seed=i) for i in range(60)]
    generations = run(generate_all(engine, prompts, params))
    assert {g.finish_reason for g in generations} == {"stop", "length"}
    for generation in generations:
        ended = generation.token_ids[-1] == eos
        assert (generation.finish_reason == "stop") == ended
        assert generation.text.endswith("<|im_end|>") == ended
        assert ended or len(generation.token_ids) == 100
    short = run(engine.generate(prompts[0], GenerateParams(max_new_tokens=100, min_new_tokens=100, seed=0)))
    assert len(short.token_ids) == 100
    assert eos not in short.token_ids


def test_bad_requests_fail_alone(engine: Engine, run: Any) -> None:
    good = GenerateParams(max_new_tokens=4, seed=1)

    async def mixed() -> list[Any]:
        return await asyncio.gather(
            engine.generate([], good),
            engine.generate([5] * 512, good),
            engine.generate([5, 6], GenerateParams(max_new_tokens=4, temperature=-1.0)),
            engine.generate([5, 6], GenerateParams(max_new_tokens=0)),
            engine.generate([5, 10_000_000], good),
            engine.logprobs([[]]),
            engine.generate([5, 6, 7], good),
            return_exceptions=True,
        )

    *bad, fine = run(mixed())
    assert all(isinstance(error, EngineError) and "refused" in str(error) for error in bad)
    assert "max_model_len" in str(bad[1])
    assert len(fine.token_ids) == 4


def test_a_request_over_its_deadline_is_dropped(engine: Engine, run: Any, until: Any) -> None:
    params = GenerateParams(max_new_tokens=400, min_new_tokens=400)
    with pytest.raises(EngineTimeout, match="did not generate within"):
        run(engine.generate([5, 6, 7], params, timeout_s=0.02))
    run(until(lambda: engine.stats().running == 0))
    assert len(run(engine.generate([5, 6, 7], GenerateParams(max_new_tokens=3, min_new_tokens=3))).token_ids) == 3


def test_abort_all_returns_what_there_is(engine: Engine, run: Any, until: Any) -> None:
    params = GenerateParams(max_new_tokens=450, min_new_tokens=450, seed=4)

    async def abort() -> tuple[list[Generation], int]:
        tasks = [asyncio.create_task(engine.generate(prompt, params)) for prompt in random_prompts(8, 10, 20)]
        steps = engine.stats().steps
        await until(lambda: engine.stats().steps >= steps + 10)
        count = await engine.abort_all()
        return await asyncio.gather(*tasks), count

    generations, count = run(abort())
    assert count == 8
    for generation in generations:
        assert generation.finish_reason == "abort"
        assert 0 < len(generation.token_ids) == len(generation.logprobs) < 450
    assert engine.stats().running == 0


def test_logprobs_probe_matches_transformers_and_leaves_the_cache_alone(engine: Engine, model_path: Path, run: Any) -> None:
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    sequences = random_prompts(6, 2, 300, seed=8)
    run(engine.generate(sequences[0], GenerateParams(max_new_tokens=1)))
    cached = engine.stats().cached_prompt_tokens
    for ids, scores in zip(sequences, run(engine.logprobs(sequences)), strict=True):
        assert len(scores) == len(ids)
        assert scores[0] == 0.0
        assert torch.allclose(torch.tensor(scores), reference_logprobs(model, ids), atol=1e-4)
    assert engine.stats().cached_prompt_tokens == cached


def test_two_event_loops_share_one_engine(engine: Engine) -> None:
    params = GenerateParams(max_new_tokens=5, min_new_tokens=5, seed=2)
    first = asyncio.run(engine.generate([9, 8, 7], params))
    second = asyncio.run(engine.generate([9, 8, 7], params))
    assert first.token_ids == second.token_ids
