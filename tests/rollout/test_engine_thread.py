"""The engine's thread with a scripted backend: failures, deadlines, hand-over."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from searchr1.agent.settings import GenerateParams
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.rollout.backend import Finished
from searchr1.rollout.engine import Engine, EngineError, EngineTimeout
from searchr1.rollout.settings import EngineSettings
from searchr1.rollout.weights import WeightManifest, WeightPublisher

SETTINGS = EngineSettings(max_model_len=100, startup_timeout_s=5.0, request_timeout_s=5.0, update_timeout_s=5.0)
PARAMS = GenerateParams(max_new_tokens=3)


class ScriptedBackend:
    """Every request takes `max_new_tokens` steps."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.listeners: dict[str, Any] = {}
        self.steps = 0
        self.threads: set[int] = set()
        self.closed = False
        self.ended: list[Finished] = []
        self.on_step: Callable[[], Any] = lambda: None

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    def add(self, request_id: str, prompt_ids: list[int], params: GenerateParams, on_text: Any = None) -> None:
        self.left[request_id] = params.max_new_tokens
        self.done[request_id] = 0
        self.listeners[request_id] = on_text

    def add_scoring(self, request_id: str, token_ids: list[int]) -> None:
        self.left[request_id] = 1

    def step(self) -> list[Finished]:
        self.threads.add(threading.get_ident())
        self.steps += 1
        self.on_step()
        for request_id in self.left:
            self.left[request_id] -= 1
            if self.left[request_id] and self.listeners.get(request_id):
                self.listeners[request_id]("x" * self.left[request_id])
        ended = [request_id for request_id, left in self.left.items() if left == 0]
        return [self.finish(request_id) for request_id in ended]

    def finish(self, request_id: str, reason: Any = "length") -> Finished:
        del self.left[request_id]
        return Finished(request_id, [1], [-0.5], "x", reason, 2, 1, None)

    def abort(self, request_ids: list[str]) -> list[Finished]:
        return [self.finish(request_id, "abort") for request_id in request_ids if request_id in self.left]

    def take_ended(self) -> list[Finished]:
        ended, self.ended = self.ended, []
        return ended

    def load_weights(self, bucket: WeightManifest) -> list[str]:
        return ["slow"] if bucket.last else []

    def load_adapter(self, folder: str, version: int) -> None: ...
    def reset_prefix_cache(self) -> None: ...
    def sleep(self, level: int) -> None: ...
    def wake(self, tags: tuple[str, ...]) -> None: ...

    def close(self) -> None:
        self.closed = True


def play(scene: Callable[[Engine, ScriptedBackend], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        backend = ScriptedBackend()
        engine = await Engine.start_backend(lambda: backend, SETTINGS)
        try:
            async with asyncio.timeout(20):
                await scene(engine, backend)
        finally:
            await engine.close()
        assert backend.closed

    asyncio.run(main())


@pytest.mark.parametrize(("before", "after"), [(0.005, 0.0005), (0.0001, 0.0001)])
def test_a_busy_loop_holds_the_engine_up_for_half_a_millisecond_at_most(
    monkeypatch: pytest.MonkeyPatch, before: float, after: float
) -> None:
    monkeypatch.setattr("searchr1.rollout.engine.VllmBackend", lambda *args: ScriptedBackend())
    own = sys.getswitchinterval()
    try:
        sys.setswitchinterval(before)

        async def scene() -> None:
            engine = await Engine.start("model", Device("cpu", 1, 1), SETTINGS)
            await engine.close()

        asyncio.run(scene())
        assert sys.getswitchinterval() == pytest.approx(after, abs=2e-6)
    finally:
        sys.setswitchinterval(own)


def test_one_thread_steps_and_answers_everyone() -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        answers = await asyncio.gather(
            *(engine.generate([1, 2], GenerateParams(max_new_tokens=1 + i % 7)) for i in range(500))
        )
        assert len(answers) == 500
        assert all(answer.text == "x" for answer in answers)
        assert len(backend.threads) == 1
        assert threading.get_ident() not in backend.threads
        assert engine.stats().requests == 500
        assert engine.stats().running == 0
        assert engine.stats().prefix_cache_hit_rate == 0.5

    play(scene)


def test_what_ends_in_one_step_comes_back_in_one_call() -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        gate = threading.Event()
        backend.on_step = lambda: gate.wait(10)
        tasks = [asyncio.create_task(engine.generate([1], PARAMS)) for _ in range(50)]
        await asyncio.sleep(0.05)
        loop = asyncio.get_running_loop()
        calls = []
        original = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args, **kwargs: (calls.append(args), original(*args, **kwargs))[1]  # type: ignore[method-assign]
        gate.set()
        await asyncio.gather(*tasks)
        # The first request may have been stepped before the other 49 arrived.
        assert len(calls) <= 2

    play(scene)


def test_a_listener_hears_the_text_in_order_in_its_own_loop_and_before_the_end() -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        heard: list[str] = []
        threads = set()

        def listen(text: str) -> None:
            heard.append(text)
            threads.add(threading.get_ident())

        await engine.generate([1], GenerateParams(max_new_tokens=4), on_text=listen)
        assert heard == ["xxx", "xx", "x"]
        assert threads == {threading.get_ident()}
        await engine.generate([1], GenerateParams(max_new_tokens=4))
        assert len(heard) == 3
        assert list(backend.listeners.values())[-1] is None

    play(scene)


def test_a_crash_fails_everyone_with_the_reason() -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        def crash() -> None:
            if backend.steps == 3:
                raise ValueError("kernel exploded")

        backend.on_step = crash
        tasks = [asyncio.create_task(engine.generate([1], GenerateParams(max_new_tokens=50))) for _ in range(20)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineError) for result in results)
        assert all("ValueError: kernel exploded" in str(result) for result in results)
        assert isinstance(results[0].__cause__, ValueError)  # type: ignore[union-attr]
        for later in (engine.generate([1], PARAMS), engine.reset_prefix_cache(), engine.abort_all()):
            with pytest.raises(EngineError, match="kernel exploded"):
                await later
        assert engine.stats().running == 0

    play(scene)


def bucket(directory: Any) -> WeightManifest:
    return next(WeightPublisher(directory, 64).publish([("a", torch.ones(1))], 1, 1))


def test_an_update_returns_what_slowed_it_down(tmp_path: Any) -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        assert await engine.update_weights(bucket(tmp_path)) == ["slow"]
        assert engine.weight_version == 1

    play(scene)


def test_a_failed_update_stops_the_engine(tmp_path: Any) -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        def fail(*args: object) -> None:
            raise RuntimeError("left 3 parameters as they were")

        backend.load_weights = fail  # type: ignore[method-assign]
        running = asyncio.create_task(engine.generate([1], GenerateParams(max_new_tokens=10**9)))
        await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="left 3 parameters"):
            await engine.update_weights(bucket(tmp_path))
        with pytest.raises(EngineError, match="left 3 parameters"):
            await running
        assert engine.weight_version == 0

    play(scene)


def test_a_failed_start_says_why() -> None:
    def broken() -> ScriptedBackend:
        raise OSError("no such model")

    with pytest.raises(EngineError, match="no such model") as caught:
        asyncio.run(Engine.start_backend(broken, SETTINGS))
    assert isinstance(caught.value.__cause__, OSError)

    def mistaken() -> ScriptedBackend:
        raise UserError("rollout.model.model_path: wrong")

    with pytest.raises(UserError, match="model_path"):
        asyncio.run(Engine.start_backend(mistaken, SETTINGS))


def test_a_hanging_engine_does_not_hang_its_callers() -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        gate = threading.Event()
        backend.on_step = lambda: gate.wait(10)
        started = time.monotonic()
        with pytest.raises(EngineTimeout, match=r"did not generate within 0\.1 s"):
            await engine.generate([1], PARAMS, timeout_s=0.1)
        assert time.monotonic() - started < 5
        gate.set()

    play(scene)


def test_a_cancelled_caller_frees_its_request(until: Any) -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        task = asyncio.create_task(engine.generate([1], GenerateParams(max_new_tokens=10**9)))
        await until(lambda: engine.stats().running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats().running == 0)
        assert not backend.has_work

    play(scene)


def test_requests_wait_while_the_engine_sleeps() -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        running = asyncio.create_task(engine.generate([1], GenerateParams(max_new_tokens=1000)))
        await engine.sleep()
        waiting = asyncio.create_task(engine.generate([1], PARAMS))
        steps = engine.stats().steps
        await asyncio.sleep(0.05)
        assert engine.stats().steps == steps
        assert not waiting.done()
        await engine.wake()
        await asyncio.gather(running, waiting)

    play(scene)


def manifest(last: bool = True, adapter: bool = False) -> WeightManifest:
    return WeightManifest(7, directory="", path="", parts=(), total_bytes=0, last=last, fresh=False, adapter=adapter)


def test_nothing_is_generated_between_dropped_weights_and_new_ones() -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        backend.on_step = lambda: time.sleep(0.002)
        running = asyncio.create_task(engine.generate([1], GenerateParams(max_new_tokens=100)))
        await asyncio.sleep(0.01)
        await engine.sleep(2)
        waiting = asyncio.create_task(engine.generate([1], PARAMS))
        await asyncio.sleep(0.01)
        steps = engine.stats().steps
        with pytest.raises(EngineError, match="weights' memory is away"):
            await engine.update_weights(manifest())
        await engine.wake(("weights",))
        await engine.wake(("kv_cache",))
        for call in (engine.generate([1], PARAMS), engine.logprobs([[1, 2]])):
            with pytest.raises(EngineError, match="weights were dropped"):
                await call
        await engine.update_weights(manifest(adapter=True))  # which does not bring the rest
        await engine.update_weights(manifest(last=False))
        with pytest.raises(EngineError, match="weights were dropped"):
            await engine.generate([1], PARAMS)
        assert engine.stats().steps == steps
        assert not running.done()
        assert not waiting.done()
        await engine.update_weights(manifest())
        await asyncio.gather(running, waiting, engine.generate([1], PARAMS))

    play(scene)


def test_weights_wake_and_change_before_the_cache_wakes() -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        waiting = asyncio.create_task(engine.generate([1], PARAMS))
        await engine.sleep(2)
        await asyncio.sleep(0.01)
        steps = engine.stats().steps
        await engine.wake(("weights",))
        await engine.update_weights(manifest())
        await asyncio.sleep(0.01)
        assert engine.stats().steps == steps
        await engine.wake(("kv_cache",))
        await waiting
        assert engine.weight_version == 7

    play(scene)


def test_sleeping_or_waking_twice_is_rejected_and_harms_nothing() -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        with pytest.raises(EngineError, match="what is away is nothing"):
            await engine.wake()
        await engine.sleep()
        with pytest.raises(EngineError, match="cannot go to sleep: it sleeps"):
            await engine.sleep(2)
        await engine.wake(("weights",))
        with pytest.raises(EngineError, match="cannot wake weights: what is away is kv_cache"):
            await engine.wake(("weights",))
        await engine.wake(("kv_cache",))
        await engine.generate([1], PARAMS)  # level 1 kept the weights
        await engine.update_weights(manifest(last=False))
        with pytest.raises(EngineError, match="cannot go to sleep: it is updated"):
            await engine.sleep()

    play(scene)


def test_closing_fails_what_is_left_and_can_be_repeated() -> None:
    async def scene(engine: Engine, backend: ScriptedBackend) -> None:
        task = asyncio.create_task(engine.generate([1], GenerateParams(max_new_tokens=10**9)))
        await asyncio.sleep(0.01)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await task
        with pytest.raises(EngineError, match="closed"):
            await engine.generate([1], PARAMS)

    play(scene)
