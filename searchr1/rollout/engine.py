"""The rollout engine as the agent loop sees it: `await engine.generate(...)`.

vLLM's synchronous engine runs in this process, stepped by one thread that owns it. Coroutines hand requests to that
thread through a queue; after each step the thread hands everything that ended back to the event loop in one call.

Measured on one core, 64 trajectories of three turns (48 sampled and 100 tool tokens each): 13,500 tokens/s against
AsyncLLM's 10,000 with a 0.1M-parameter model, 4,600 against 3,800 with 1.5M parameters; AsyncLLM also takes a second
process and 20 s more to start. Seeded requests cost 5% (a generator per request), stop strings nothing measurable.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from searchr1.agent.settings import GenerateParams, Generation
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.rollout.backend import KV_CACHE, WEIGHTS, Backend, Command, Finished, OnText, Pending, across_threads, deliver
from searchr1.rollout.settings import EngineSettings
from searchr1.rollout.vllm_backend import VllmBackend
from searchr1.rollout.weights import WeightManifest

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 30.0
_SWITCH_SECONDS = 0.0005
"""How long one of the process's threads may keep another waiting for the interpreter. The engine's thread gives it away at
every call into torch, and gets it back from a busy event loop only after this. CPython's 5 ms is a whole step of a small
model on a GPU. Measured with benchmarks/gpu/check_engine.py, 64 sequences of its small model beside a loop that is busy a
third of its time: on a GPU (one pass each) 7,781 tokens/s against 5,877 at 5 ms with CUDA graphs (11,655 beside an
idle loop), 5,435 against 5,158 without; on two CPU cores no difference beyond noise (four passes, 1,760 and 1,711)."""


class EngineError(RuntimeError):
    """The engine refused or lost a request, or stopped."""


class EngineTimeout(EngineError):
    """The engine did not answer in time."""


@dataclass(slots=True)
class EngineStats:
    """Counts since the start."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Prompt tokens that the prefix cache saved."""
    generated_tokens: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    """Time spent stepping the model."""
    weight_updates: int = 0
    running: int = 0
    """Requests unfinished now."""

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Share of prompt tokens that came from the cache."""
        return self.cached_prompt_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Engine:
    """One vLLM engine; safe to use from any coroutine, and from more than one event loop.

    A request with a seed gives the same tokens whatever else is running. (In float32 on a CPU this is exact; in half
    precision a kernel may sum in another order at another batch size, and a near tie can fall the other way.)
    """

    def __init__(self, backend_factory: Callable[[], Backend], settings: EngineSettings) -> None:
        """Use `Engine.start`; this only keeps the factory, which runs in the engine's thread."""
        self._factory = backend_factory
        self._settings = settings
        self._ids = itertools.count()
        self._thread = threading.Thread(target=self._run, name="rollout-engine", daemon=True)
        # Guarded by `_wakeup`.
        self._wakeup = threading.Condition()
        self._commands: list[Command] = []
        self._closing = False
        self._stop_reason: str | None = None
        self._cause: BaseException | None = None
        # Written by the engine's thread only.
        self._requests: dict[str, Pending] = {}
        self._outbox: list[Pending] = []
        self._stats = EngineStats()
        self._weight_version = 0
        self._asleep: set[str] = set()
        self._updating = False
        self._dropped = False  # the weights, until new ones have come

    @classmethod
    async def start(cls, model_path: str, device: Device, settings: EngineSettings) -> Engine:
        """Load the model and start the thread.

        One engine per process: vLLM keeps its parallel state in module globals. So the process's threads may be made to
        take turns more often, too.

        Raises:
            UserError: the model or the environment cannot be used.
            EngineError: the engine did not come up (`__cause__` says why).
            EngineTimeout: it took longer than `startup_timeout_s`.
        """
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        return await cls.start_backend(lambda: VllmBackend(model_path, device, settings), settings)

    @classmethod
    async def start_backend(cls, backend_factory: Callable[[], Backend], settings: EngineSettings) -> Engine:
        """Like `start`, with a backend of one's own."""
        engine = cls(backend_factory, settings)
        engine._thread.start()
        await engine._call(lambda backend: None, settings.startup_timeout_s, "start")
        return engine

    @property
    def weight_version(self) -> int:
        """Version of the weights in use; 0 until the first update."""
        return self._weight_version

    @property
    def stop_reason(self) -> str | None:
        """Why the engine has stopped; None while it works."""
        return self._stop_reason

    def stats(self) -> EngineStats:
        """Return a copy of the counters."""
        return replace(self._stats, running=len(self._requests))

    async def generate(
        self,
        prompt_ids: list[int],
        params: GenerateParams,
        timeout_s: float | None = None,
        on_text: OnText | None = None,
    ) -> Generation:
        """Sample one continuation. `on_text` receives the text so far, in the caller's event loop, as it grows.

        The log-probabilities are those of the distribution sampled from (temperature, top-p, top-k and penalties
        applied); greedy ones are at temperature 1. Special tokens are part of the text. `weight_version` is that of the
        first token: an update in mid-flight goes on with the new weights.

        Raises:
            EngineTimeout: not done after `timeout_s` (default `request_timeout_s`); the request is aborted.
            EngineError: the request was refused, the engine is awake without weights, or it stopped.
        """
        request_id = f"request-{next(self._ids)}"
        pending = self._expect()
        prompt_ids = list(prompt_ids)

        listener = None if on_text is None else across_threads(pending.loop, on_text)

        def add(backend: Backend) -> None:
            self._add(request_id, pending, lambda: backend.add(request_id, prompt_ids, params, listener))

        self._send(Command(add, pending, answers_later=True))
        timeout_s = timeout_s or self._settings.request_timeout_s
        result: Generation = await self._wait(pending, timeout_s, "generate", request_id)
        return result

    async def logprobs(self, sequences: list[list[int]], timeout_s: float | None = None) -> list[list[float]]:
        """Score given tokens at temperature 1, without the prefix cache: a probe of the weights.

        Returns:
            For each sequence one value per token; 0 for the first, which has nothing before it.

        Raises:
            EngineTimeout, EngineError: as `generate`.
        """
        return list(await asyncio.gather(*(self._score(sequence, timeout_s) for sequence in sequences)))

    async def update_weights(self, manifest: WeightManifest) -> list[str]:
        """Load published weights and empty the prefix cache.

        Loses no request: what is running goes on with the new weights, its cache recomputed. Weights may come in several
        parts, in order; from the first to the last the engine stands still.

        Returns:
            What made it slower than it should be, as sentences.

        Raises:
            EngineError: the file is missing or the weights are asleep (the engine goes on as before), or loading failed (the
                engine stops, because its weights are a mixture).
            EngineTimeout: not done after `update_timeout_s`.
        """
        _check_file(manifest)

        def load(backend: Backend) -> list[str]:
            if WEIGHTS in self._asleep:
                raise EngineError(f"weights of version {manifest.version} came while the weights' memory is away; wake it")
            warnings: list[str] = []
            if manifest.adapter:
                backend.load_adapter(manifest.directory, manifest.version)
            else:
                warnings = backend.load_weights(manifest)
            self._updating = not manifest.last
            if manifest.last:
                self._dropped = self._dropped and manifest.adapter  # an adapter does not bring the rest
                self._weight_version = manifest.version
                self._stats.weight_updates += 1
            return warnings

        timeout_s = self._settings.update_timeout_s
        slow: list[str] = await self._call(load, timeout_s, f"load weights of version {manifest.version}")
        return slow

    async def reset_prefix_cache(self) -> None:
        """Forget cached prompts (an update does so by itself)."""
        timeout_s = self._settings.update_timeout_s
        await self._call(lambda backend: backend.reset_prefix_cache(), timeout_s, "reset its cache")

    async def sleep(self, level: int = 1) -> None:
        """Hand GPU memory to the trainer (on a CPU there is none to hand over). Requests wait until `wake`.

        Args:
            level: 1 keeps the weights in host memory, 2 drops them. Then nothing is generated before an update has
                brought all of them: requests that are there wait for it, and once the engine is awake new ones are refused.

        Raises:
            EngineError: an update has begun and not ended, or part of the memory is away already.
        """

        def sleep(backend: Backend) -> None:
            if self._updating or self._asleep:
                raise EngineError("the engine cannot go to sleep: " + ("it is updated" if self._updating else "it sleeps"))
            backend.sleep(level)
            self._asleep = {WEIGHTS, KV_CACHE}
            self._dropped = self._dropped or level > 1

        await self._call(sleep, self._settings.update_timeout_s, "sleep")

    async def wake(self, tags: tuple[str, ...] = (WEIGHTS, KV_CACHE)) -> None:
        """Take GPU memory back: of the weights, so that new ones can be loaded, of the KV cache, or of both and go on.

        Raises:
            EngineError: that memory is not away.
        """

        def wake(backend: Backend) -> None:
            if not set(tags) <= self._asleep:
                away = ", ".join(sorted(self._asleep)) or "nothing"
                raise EngineError(f"the engine cannot wake {', '.join(tags)}: what is away is {away}")
            backend.wake(tags)
            self._asleep -= set(tags)

        await self._call(wake, self._settings.update_timeout_s, "wake")

    async def abort_all(self) -> int:
        """End all generations; they return what they have, with finish_reason "abort". Returns how many."""

        def abort(backend: Backend) -> int:
            finished = backend.abort(list(self._requests))
            self._settle(finished)
            return len(finished)

        count: int = await self._call(abort, self._settings.update_timeout_s, "abort requests")
        return count

    async def close(self) -> None:
        """Stop the thread and free the engine; requests still running fail. Closing twice does no harm."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()
        await asyncio.to_thread(self._thread.join, _CLOSE_SECONDS)

    # The event loop's side.

    async def _score(self, sequence: list[int], timeout_s: float | None) -> list[float]:
        request_id = f"score-{next(self._ids)}"
        pending = self._expect()
        token_ids = list(sequence)

        def add(backend: Backend) -> None:
            self._add(request_id, pending, lambda: backend.add_scoring(request_id, token_ids))

        self._send(Command(add, pending, answers_later=True))
        timeout_s = timeout_s or self._settings.request_timeout_s
        result: list[float] = await self._wait(pending, timeout_s, "score tokens", request_id)
        return result

    async def _call(self, run: Callable[[Backend], Any], timeout_s: float, what: str) -> Any:
        pending = self._expect()
        self._send(Command(run, pending))
        return await self._wait(pending, timeout_s, what)

    def _expect(self) -> Pending:
        loop = asyncio.get_running_loop()
        return Pending(loop.create_future(), loop)

    def _send(self, command: Command) -> None:
        with self._wakeup:
            if self._stop_reason is not None or self._closing:
                raise self._stopped()
            self._commands.append(command)
            self._wakeup.notify()

    async def _wait(self, pending: Pending, timeout_s: float, what: str, request_id: str | None = None) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await pending.future
        except (TimeoutError, asyncio.CancelledError) as error:
            if request_id is not None:
                with contextlib.suppress(EngineError, UserError):
                    self._send(Command(lambda backend: self._settle(backend.abort([request_id]))))
            if isinstance(error, TimeoutError):
                raise EngineTimeout(f"the rollout engine did not {what} within {timeout_s:g} s") from error
            raise

    def _stopped(self) -> Exception:
        if isinstance(self._cause, UserError):
            return self._cause
        error = EngineError(self._stop_reason or "the rollout engine was closed")
        error.__cause__ = self._cause
        return error

    # The engine thread's side.

    def _run(self) -> None:
        backend: Backend | None = None
        try:
            backend = self._factory()
            while self._turn(backend):
                pass
        except BaseException as error:
            self._cause = error
            self._stop("the rollout engine stopped: " + (f"{type(error).__name__}: {error}".strip(": ")))
        else:
            self._stop("the rollout engine was closed")
        finally:
            if backend is not None:
                try:
                    backend.close()
                except Exception:
                    logger.exception("closing the rollout engine failed")

    def _turn(self, backend: Backend) -> bool:
        """Run waiting commands and one step. Return False once closed."""
        with self._wakeup:
            while not self._commands and not self._closing and not self._can_step(backend):
                self._wakeup.wait()
            if self._closing:
                return False
            commands, self._commands = self._commands, []
        for position, command in enumerate(commands):
            try:
                answer = command.run(backend)
            except EngineError as refusal:  # nothing was done
                assert command.pending is not None
                command.pending.error, answer = refusal, None
            except BaseException:
                with self._wakeup:
                    self._commands = commands[position:] + self._commands
                raise
            finally:
                self._settle(backend.take_ended())
            if command.pending is not None and not command.answers_later:
                command.pending.answer = answer
                self._outbox.append(command.pending)
        if self._can_step(backend):
            started = time.perf_counter()
            finished = backend.step()
            self._stats.busy_seconds += time.perf_counter() - started
            self._stats.steps += 1
            self._settle(finished)
        deliver(self._outbox)
        self._outbox = []
        return True

    def _can_step(self, backend: Backend) -> bool:
        return backend.has_work and not self._asleep and not self._updating and not self._dropped

    def _add(self, request_id: str, pending: Pending, add: Callable[[], None]) -> None:
        if pending.future.done():
            return  # given up while it waited
        try:
            if self._dropped and not self._asleep:
                raise EngineError("its weights were dropped (sleep level 2), and no new ones have been loaded")
            add()
        except Exception as error:
            pending.error = EngineError(f"the rollout engine refused a request: {error}")
            pending.error.__cause__ = error
            self._outbox.append(pending)
            return
        pending.weight_version = self._weight_version
        self._requests[request_id] = pending

    def _settle(self, finished: list[Finished]) -> None:
        for one in finished:
            pending = self._requests.pop(one.request_id, None)
            self._stats.requests += 1
            self._stats.prompt_tokens += one.prompt_tokens
            self._stats.cached_prompt_tokens += one.cached_tokens
            self._stats.generated_tokens += len(one.token_ids)
            if pending is None:
                continue
            if one.prompt_logprobs is not None:
                pending.answer = one.prompt_logprobs
            else:
                pending.answer = Generation(
                    token_ids=one.token_ids,
                    logprobs=one.logprobs,
                    text=one.text,
                    finish_reason=one.finish_reason,
                    weight_version=pending.weight_version,
                )
            self._outbox.append(pending)

    def _stop(self, reason: str) -> None:
        with self._wakeup:
            self._stop_reason = reason
            commands, self._commands = self._commands, []
        waiting = [command.pending for command in commands if command.pending is not None]
        for pending in [*self._requests.values(), *waiting]:
            pending.error = self._stopped()
            self._outbox.append(pending)
        self._requests.clear()
        deliver(self._outbox)
        self._outbox = []


def _check_file(manifest: WeightManifest) -> None:
    if manifest.fresh and not os.path.exists(manifest.path):
        raise EngineError(f"weights of version {manifest.version} are gone: {manifest.path}; publish them again")
