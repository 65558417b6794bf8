"""Texts that grow: what a listener hears, and that it changes nothing of what is sampled."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

from searchr1.agent.settings import GenerateParams
from searchr1.rollout.engine import Engine


def test_a_listener_hears_beginnings_of_the_text_and_changes_nothing(engine: Engine, run: Any) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 300) for _ in range(20)] for _ in range(8)]
    stops = GenerateParams(max_new_tokens=40, min_new_tokens=2, stop=("</search>", "s", "<|im_end|>"))

    async def both(prompt: list[int], seed: int) -> None:
        # With stop strings and without: then nothing but the listener wants the text.
        for params in (replace(stops, seed=seed), GenerateParams(max_new_tokens=30, seed=seed)):
            heard: list[str] = []
            watched = await engine.generate(prompt, params, on_text=heard.append)
            plain = await engine.generate(prompt, params)
            assert watched == plain
            assert len(heard) == len(watched.token_ids) - 1
            # A text that is decoded in one go may show a character that the prompt cut in two otherwise.
            last = watched.text if params.stop else heard[-1]
            for before, after in zip(heard, [*heard[1:], last], strict=True):
                assert after.startswith(before)

    async def everyone() -> None:
        await asyncio.gather(*(both(prompt, seed) for seed, prompt in enumerate(prompts)))

    run(everyone())


def test_a_listener_that_leaves_frees_its_request(engine: Engine, run: Any, until: Any) -> None:
    async def scene() -> None:
        heard: list[str] = []
        params = GenerateParams(max_new_tokens=400, min_new_tokens=400)
        task = asyncio.create_task(engine.generate([5, 6, 7], params, on_text=heard.append))
        await until(lambda: len(heard) > 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: engine.stats().running == 0)
        count = len(heard)
        await engine.generate([5, 6, 7], GenerateParams(max_new_tokens=5))
        assert len(heard) <= count + 2  # what was on its way

    run(scene())
