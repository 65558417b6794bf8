"""An engine that runs a batch ahead of its outputs, as vLLM does on a GPU: what ends while it settles comes back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Qwen2ForCausalLM

from searchr1.agent.settings import GenerateParams
from searchr1.rollout.backend import KV_CACHE, WEIGHTS, Finished
from searchr1.rollout.engine import Engine, EngineError
from searchr1.rollout.settings import EngineSettings
from searchr1.rollout.vllm_backend import VllmBackend
from searchr1.rollout.weights import WeightManifest, release

SETTINGS = EngineSettings(
    max_model_len=100, sleep_mode=True, startup_timeout_s=5.0, request_timeout_s=5.0, update_timeout_s=5.0
)


class TwoDeepCore:
    """Stands for vLLM's EngineCore: it takes a second batch before the first one's tokens come back."""

    def __init__(self) -> None:
        self.batch_queue: deque[list[str]] = deque(maxlen=2)
        self.left: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.paused = False
        self.model_executor = SimpleNamespace(is_sleeping=False)
        self.calls: list[tuple[str, int]] = []

    def pause_scheduler(self, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)
        self.paused = True

    def resume_scheduler(self) -> None:
        self.paused = False


class TwoDeepEngine:
    """Stands for vLLM's LLMEngine; calls that must find nothing in flight note how many batches were."""

    def __init__(self) -> None:
        self.core = TwoDeepCore()
        self.output_processor = SimpleNamespace(request_states={})
        self.engine_core = SimpleNamespace(engine_core=self.core, shutdown=lambda: None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.core.left)

    def add_request(self, request_id: str, prompt: Any, params: Any, lora_request: Any = None) -> str:
        self.core.left[request_id], self.core.tokens[request_id] = params.max_tokens, []
        state = SimpleNamespace(
            logprobs_processor=SimpleNamespace(logprobs=None, tokenizer=None),
            detokenizer=SimpleNamespace(output_token_ids=self.core.tokens[request_id]),
            prompt_len=1,
        )
        self.output_processor.request_states[request_id] = state
        return request_id

    def step(self) -> list[Any]:
        core = self.core
        if core.left and not core.paused:
            core.batch_queue.appendleft(list(core.left))
            if len(core.batch_queue) < 2:
                return []
        elif not core.batch_queue:
            return []
        outputs = []
        for request_id in core.batch_queue.pop():
            if request_id not in core.left:
                continue
            core.tokens[request_id].append(7)
            core.left[request_id] -= 1
            if core.left[request_id] == 0:
                outputs.append(self.ended(request_id))
        return outputs

    def ended(self, request_id: str) -> Any:
        del self.core.left[request_id]
        del self.output_processor.request_states[request_id]
        completion = SimpleNamespace(token_ids=self.core.tokens[request_id], logprobs=None, text="x", finish_reason="length")
        return SimpleNamespace(
            request_id=request_id, finished=True, outputs=[completion], prompt_logprobs=None, prompt_token_ids=[1],
            num_cached_tokens=0,
        )  # fmt: skip

    def note(self, call: str) -> None:
        self.core.calls.append((call, len(self.core.batch_queue)))

    def abort_request(self, request_ids: list[str], internal: bool) -> None:
        self.note("abort")
        for request_id in request_ids:
            del self.core.left[request_id]
            del self.output_processor.request_states[request_id]

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.note(method)
        return [[]]  # one worker, which has no warnings

    def add_lora(self, request: Any) -> bool:
        self.note("add_lora")
        return True

    def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        self.note("reset_prefix_cache")
        return True

    def set_weight_version(self, version: str) -> None:
        self.note("set_weight_version")

    def sleep(self, level: int, mode: str) -> None:
        self.note("sleep")
        self.away = {"weights", "kv_cache"}
        self.core.paused = self.core.model_executor.is_sleeping = True

    def wake_up(self, tags: list[str]) -> None:
        self.away -= set(tags)
        self.core.paused = self.core.model_executor.is_sleeping = bool(self.away)


def two_deep_backend() -> VllmBackend:
    """The real backend around the stand-in, on a device that can sleep."""
    backend = object.__new__(VllmBackend)
    engine = TwoDeepEngine()
    backend._settings, backend._device = SETTINGS, SimpleNamespace(is_cuda=True)  # type: ignore[assignment]
    backend._llm, backend._core = engine, engine.core  # type: ignore[assignment]
    backend._tokenizer, backend._adapter = None, None
    backend._internal_ids, backend._listeners, backend._decoded_at_end, backend._ended = {}, {}, set(), []
    return backend


def part(first: bool, last: bool) -> WeightManifest:
    return WeightManifest(1, "folder", "folder/bucket-0", (), 0, first, last)


CALLS: dict[str, Callable[[VllmBackend], Any]] = {
    "update_weights": lambda backend: backend.load_weights(part(first=True, last=True)),
    "add_lora": lambda backend: backend.load_adapter("folder", 1),
    "reset_prefix_cache": lambda backend: backend.reset_prefix_cache(),
    "sleep": lambda backend: backend.sleep(1),
    "abort": lambda backend: backend.abort(["long"]),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_ends_while_the_engine_settles_is_kept(call: str) -> None:
    backend = two_deep_backend()
    backend.add("short", [1], GenerateParams(max_new_tokens=1))
    backend.add("long", [1], GenerateParams(max_new_tokens=5))
    assert backend.step() == []
    assert len(backend._core.batch_queue) == 1
    aborted = CALLS[call](backend)
    assert (call, 0) in backend._core.calls
    assert all(in_flight == 0 for _, in_flight in backend._core.calls)
    ended = backend.take_ended()
    assert [(one.request_id, one.token_ids, one.finish_reason) for one in ended] == [("short", [7], "length")]
    assert backend.take_ended() == []
    if call == "abort":
        # With the token that was in flight.
        assert [(one.request_id, one.token_ids, one.finish_reason) for one in aborted] == [("long", [7], "abort")]
        assert not backend.has_work
        return
    if call == "sleep":
        backend.wake((WEIGHTS, KV_CACHE))
    assert not backend._core.paused
    rest: list[Finished] = []
    while backend.has_work:
        rest += backend.step()
    assert [(one.request_id, len(one.token_ids)) for one in rest] == [("long", 5)]


def test_between_the_parts_of_an_update_nothing_runs_and_an_abort_does_not_change_that() -> None:
    backend = two_deep_backend()
    backend.add("long", [1], GenerateParams(max_new_tokens=5))
    backend.step()
    backend.load_weights(part(first=True, last=False))
    assert len(backend.abort(["long"])) == 1
    assert backend._core.paused
    backend.load_weights(part(first=False, last=True))
    assert not backend._core.paused


def test_new_weights_do_not_let_an_engine_schedule_whose_cache_still_sleeps() -> None:
    backend = two_deep_backend()
    backend.sleep(1)
    backend.wake((WEIGHTS,))
    backend.load_weights(part(first=True, last=True))
    assert backend._core.paused
    backend.wake((KV_CACHE,))
    assert not backend._core.paused


def test_an_engine_without_sleep_mode_does_not_pretend_to_sleep() -> None:
    backend = two_deep_backend()
    backend._settings = replace(SETTINGS, sleep_mode=False)
    with pytest.raises(RuntimeError, match="sleep_mode"):
        backend.sleep(1)


@pytest.mark.parametrize("fails", [False, True])
def test_what_ends_as_an_engine_falls_asleep_is_answered_then_and_not_when_it_wakes(fails: bool) -> None:
    async def scene() -> None:
        backend = two_deep_backend()
        engine = await Engine.start_backend(lambda: backend, SETTINGS)

        def fall_asleep(_: Any) -> None:
            backend.step()
            backend.sleep(1)
            engine._asleep = {WEIGHTS, KV_CACHE}
            if fails:
                raise RuntimeError("torn")

        try:
            async with asyncio.timeout(10):
                with engine._wakeup:  # both commands reach the thread in one turn
                    task = asyncio.create_task(engine.generate([1], GenerateParams(max_new_tokens=1)))
                    call = asyncio.create_task(engine._call(fall_asleep, 5.0, "fall asleep"))
                    await asyncio.sleep(0)
                assert (await task).token_ids == [7]
                if fails:
                    with pytest.raises(EngineError, match="torn"):
                        await call
                else:
                    await call
                    assert engine.stats().steps == 0
        finally:
            await engine.close()

    asyncio.run(scene())


@pytest.fixture
def two_deep(engine: Engine, run: Any) -> Iterator[Engine]:
    """The session's real vLLM engine with a batch queue of 2: outputs come one step later, as on a GPU."""

    def deepen(backend: Any) -> None:
        core = backend._core
        core.batch_queue, core.batch_queue_size, core.step_fn = deque(maxlen=2), 2, core.step_with_batch_queue

    def restore(backend: Any) -> None:
        backend._settle()
        backend._resume()
        core = backend._core
        core.batch_queue, core.batch_queue_size, core.step_fn = None, 1, core.step

    run(engine._call(deepen, 30.0, "change its queue"))
    yield engine
    run(engine._call(restore, 30.0, "change its queue"))


@pytest.mark.parametrize("call", ["update", "reset", "abort"])
def test_real_vllm_with_a_batch_in_flight_loses_nothing(
    two_deep: Engine, model_path: Path, tmp_path: Path, run: Any, publish_once: Any, call: str
) -> None:
    manifest = publish_once(Qwen2ForCausalLM.from_pretrained(model_path).named_parameters(), 0, tmp_path)
    params = GenerateParams(max_new_tokens=6, min_new_tokens=6, seed=3)
    expected = run(two_deep.generate([5, 9, 200], params)).token_ids

    def scene(backend: Any) -> list[Finished]:
        backend.add("short", [5, 9, 200], GenerateParams(max_new_tokens=1, min_new_tokens=1, seed=3))
        assert backend.step() == []
        assert len(backend._core.batch_queue) == 1
        backend.add("long", [5, 9, 200], params)
        if call == "update":
            backend.load_weights(manifest)
        elif call == "reset":
            backend.reset_prefix_cache()
        else:
            assert backend.abort(["short"]) == []
        ended: list[Finished] = backend.take_ended()
        assert [one.request_id for one in ended] == ["short"]
        while backend.has_work:
            ended += backend.step()
        return ended

    ended = run(two_deep._call(scene, 60.0, "play"))
    release(manifest)
    assert [one.token_ids for one in ended] == [expected[:1], expected]


def test_real_vllm_ends_every_request_across_updates(
    two_deep: Engine, model_path: Path, tmp_path: Path, run: Any, publish_once: Any
) -> None:
    manifest = publish_once(Qwen2ForCausalLM.from_pretrained(model_path).named_parameters(), 0, tmp_path)

    async def scene() -> list[Any]:
        params = [GenerateParams(max_new_tokens=1 + i % 12, min_new_tokens=1 + i % 12, seed=i) for i in range(64)]
        tasks = [asyncio.create_task(two_deep.generate([5, 9, 3 + i], p, timeout_s=20)) for i, p in enumerate(params)]
        for _ in range(8):
            await two_deep.update_weights(manifest)
        return await asyncio.gather(*tasks)

    answers = run(scene())
    release(manifest)
    assert [len(answer.token_ids) for answer in answers] == [1 + i % 12 for i in range(64)]
