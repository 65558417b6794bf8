"""A trained model that searches, for Python: load it, ask it, read how it came to its answer."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from searchr1.agent.trajectory import StopReason, Trajectory
from searchr1.chat.async_chat import AsyncChat
from searchr1.chat.events import Done, Event, Failed, Passage, Stats, ToolCalled, ToolReturned
from searchr1.chat.load import open_chat
from searchr1.chat.plan import ChatOptions, make_plan
from searchr1.config.schema import DeviceSetting

T = TypeVar("T")


class ChatError(RuntimeError):
    """A question that could not be answered: it does not fit the model, or the engine failed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one question."""

    question: str
    text: str | None
    """The answer; None if the model gave none, which `note` explains."""
    stop: StopReason
    note: str | None
    stats: Stats
    trajectory: Trajectory
    """Every token of prompt and response, with the mask of what the model sampled."""
    events: list[Event]
    """Everything that happened, in order."""

    @property
    def queries(self) -> list[str]:
        """The search queries, in order."""
        calls = (event for event in self.events if isinstance(event, ToolCalled) and event.action == "search")
        return [query for call in calls for query in call.arguments]

    @property
    def passages(self) -> list[Passage]:
        """The passages and pages that tools returned, in order."""
        returned = (event for event in self.events if isinstance(event, ToolReturned))
        return [passage for event in returned for passages in event.results for passage in passages]


class Chat:
    """A loaded model that answers questions, each on its own.

    `ask` and `stream` may be called from several threads at once; the engine batches their questions. The model works in a
    thread of its own, so that a notebook with a running event loop can use it too. Use it as a context manager, or call
    `close`: the engine's memory is freed then.

        with Chat.load("models/search-r1-3b", retriever_url="http://127.0.0.1:8000") as chat:
            answer = chat.ask("Who wrote the first program?")
            print(answer.queries, answer.text)
    """

    def __init__(self, open_chat: Callable[[], Coroutine[Any, Any, AsyncChat]]) -> None:
        """Start a thread with an event loop and open the chat in it; `load` is the usual way to do that."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="searchr1-chat", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self._chat = self._run(open_chat())
        except BaseException:
            self._stop_loop()
            raise

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        retriever_url: str | Sequence[str] | None = None,
        search: bool = True,
        access: bool = False,
        config: str | Path | None = None,
        prompt_template: str | None = None,
        device: DeviceSetting | None = None,
        topk: int | None = None,
        max_turns: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        overrides: Sequence[str] = (),
    ) -> Self:
        """Load a model with the prompt, limits and sampling that it was trained and evaluated with.

        Args:
            model: Hugging Face folder or hub name; may be left out with `config`.
            retriever_url: one or several retrieval servers; default: `tools.search.server_addr` of the configuration.
            search: False answers without any search.
            access: whether the model may open pages.
            config: `config.yaml` of a run, in place of the model's `searchr1.json`.
            prompt_template: see `data.prompt_template`; default: the run's, else `searchr1`.
            device: `cpu` or `cuda`; default: a GPU if there is one.
            topk: passages per query.
            max_turns: turns that may search; a last one without follows.
            temperature: of sampling; default: greedy.
            seed: of sampling.
            overrides: further `key=value` of the configuration.

        Raises:
            UserError: the model, the retrieval server or an option cannot be used. Its message names options as the flags of
                `searchr1 chat`.
        """
        plan = make_plan(
            ChatOptions(
                model_path=None if model is None else str(model),
                config=None if config is None else Path(config),
                overrides=overrides,
                device=device,
                prompt_template=prompt_template,
                retriever_url=[retriever_url] if isinstance(retriever_url, str) else retriever_url,
                search=search,
                access=access,
                topk=topk,
                max_turns=max_turns,
                temperature=temperature,
                seed=seed,
            )
        )
        return cls(lambda: open_chat(plan))

    @property
    def about(self) -> dict[str, Any]:
        """The model, its search and its limits, for people."""
        return self._chat.about

    def ask(self, question: str) -> Answer:
        """Answer one question.

        Raises:
            ChatError: the question does not fit the model, or the engine failed.
        """
        events = list(self.stream(question))
        last = events[-1]
        if not isinstance(last, Done):
            raise ChatError(last.message if isinstance(last, Failed) else "the answer has no end")
        return Answer(question, last.answer, last.stop, last.note, last.stats, last.trajectory, events)

    def stream(self, question: str) -> Iterator[Event]:
        """Yield the events of one answer as they happen; the last one is `Done` or `Failed`.

        Closing the iterator, or an exception in the loop over it, aborts the generation.
        """
        if self._closed:
            raise ChatError("the chat is closed")
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        future = asyncio.run_coroutine_threadsafe(self._forward(question, events.put), self._loop)
        event: Event | None = None
        try:
            while (event := events.get()) is not None:
                yield event
            future.result()
        finally:
            if not future.done():
                future.cancel()
                while events.get() is not None:  # until the generation has been aborted
                    pass

    def close(self) -> None:
        """Free the engine and the connections. Closing twice does no harm."""
        if self._closed:
            return
        self._closed = True
        try:
            self._run(self._chat.aclose())
        finally:
            self._stop_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def _forward(self, question: str, put: Callable[[Event | None], None]) -> None:
        try:
            async with aclosing(self._chat.ask(question)) as events:
                async for event in events:
                    put(event)
        finally:
            put(None)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _stop_loop(self) -> None:
        async def settle() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.get_running_loop().shutdown_asyncgens()

        with suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(settle(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
