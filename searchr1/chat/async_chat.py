"""A loaded model that answers questions with the prompt, loop and tools of training, event by event."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from searchr1.agent.loop import GenerateFn
from searchr1.agent.protocol import last_answer, truncate_text
from searchr1.agent.settings import AgentSettings
from searchr1.agent.tools import SearchBackend, Tool
from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.chat.events import Done, Event, Failed, Started, Stats
from searchr1.chat.observers import Emit, ObservedRollout, StreamingEngine
from searchr1.data.prompts import render_prompt, wants_passages
from searchr1.errors import UserError
from searchr1.retrieval.client.client import SearchUnavailable
from searchr1.retrieval.documents import Page
from searchr1.rewards.answers import has_tag

logger = logging.getLogger(__name__)

NO_TAGS = (
    "; it wrote no <search> or <answer> tag at all: is this the prompt that it was trained with "
    "(--prompt_template, --config)?"
)


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """How a question becomes a prompt."""

    template: str
    """Of `searchr1.data.prompts`."""
    chat: bool
    """As a user message through the tokenizer's chat template."""
    max_tokens: int
    """Prompt tokens, at most."""


class AsyncChat:
    """A model that answers questions, any number at once, in one event loop."""

    def __init__(
        self,
        *,
        engine: StreamingEngine,
        tokenizer: Any,
        tools: Mapping[str, Tool],
        backend: SearchBackend | None,
        settings: AgentSettings,
        prompt: PromptSettings,
        run: GenerateFn,
        seed: int,
        about: dict[str, Any],
    ) -> None:
        """Take what `searchr1.chat.load` has loaded.

        Args:
            engine: shared by all questions.
            tokenizer: the model's.
            tools: by action.
            backend: search backend behind the tools; None: there is no search.
            settings: limits and sampling of the loop.
            prompt: the template.
            run: `run_trajectory`, or the run's own `agentloop.generate_fn`.
            seed: of sampling, where it is not greedy.
            about: facts about the model and its search, for people.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._tools = dict(tools)
        self._backend = backend
        self._settings = settings
        self._prompt = prompt
        self._run = run
        self._seed = seed
        self._ids = itertools.count()
        self.about = about

    async def ask(self, question: str) -> AsyncGenerator[Event, None]:
        """Yield the events of one answer. The last event is `Done` or `Failed`; leaving early aborts the generation."""
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        task = asyncio.create_task(self._answer(question, events.put_nowait))
        task.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def page(self, url: str) -> Page | None:
        """Return a page for people to read, None if there is none.

        Raises:
            SearchUnavailable: the server did not answer, or has no pages.
        """
        if self._backend is None:
            raise SearchUnavailable("the search is off")
        (page,) = await self._backend.access([url])
        return page

    @property
    def stop_reason(self) -> str | None:
        """Why the engine has stopped for good; None while it works."""
        reason: str | None = getattr(self._engine, "stop_reason", None)
        return reason

    async def aclose(self) -> None:
        """Free engine and connections."""
        if self._backend is not None:
            await self._backend.aclose()
        close = getattr(self._engine, "close", None)
        if close is not None:
            await close()

    async def _answer(self, question: str, emit: Emit) -> None:
        from searchr1.rollout.engine import EngineError

        started = time.perf_counter()
        try:
            sample = await self._sample(question)
            emit(Started(len(sample.prompt_ids)))
            observed = ObservedRollout(self._engine, self._tools, self._tokenizer, emit)
            trajectory = await self._run(
                sample=sample,
                rollout_id=0,
                engine=observed,
                tools=observed.tools,
                tokenizer=self._tokenizer,
                settings=self._settings,
                seed=self._seed,
            )
            emit(summarise(trajectory, self._settings, time.perf_counter() - started))
        except UserError as error:
            emit(Failed(str(error)))
        except EngineError as error:
            logger.exception("the engine failed")
            emit(Failed(str(error)))
        except Exception as error:
            logger.exception("answering %r failed", question[:200])
            emit(Failed(f"{type(error).__name__}: {error}"))

    async def _sample(self, question: str) -> Sample:
        """Return the question as the loop takes it.

        Raises:
            UserError: it is empty or does not fit, or the template shows passages and the search fails.
        """
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise UserError("the question holds half of a surrogate pair; it is not text") from error
        # A number of its own: the same question twice is sampled twice, where sampling is on. Taken before any search, so
        # that the order in which questions come decides.
        number = next(self._ids)
        question = question.strip()
        passages = None
        if wants_passages(self._prompt.template):
            result = await self._tools["search"].call([question])
            if result.error is not None:
                raise UserError(f"the template {self._prompt.template} shows passages; the search failed: {result.error}")
            settings = self._settings
            passages = truncate_text(result.body, self._tokenizer, settings.max_tool_response_length, settings.truncate_side)
        text = render_prompt(question, question, self._tokenizer, self._prompt.template, self._prompt.chat, passages)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        limit = min(self._prompt.max_tokens, self._settings.max_model_len - 1)
        if len(ids) > limit:
            raise UserError(
                f"the question is too long: {len(ids)} tokens with its instruction, and {limit} fit "
                "(data.max_prompt_length); shorten it"
            )
        return Sample(f"question/{number}", 0, ids, question, [], "inference")


def summarise(trajectory: Trajectory, settings: AgentSettings, seconds: float) -> Done:
    """Return the last event of a finished trajectory."""
    answered = trajectory.stop == "answer"
    read = trajectory.response_length - trajectory.policy_length
    stats = Stats(
        turns=len(trajectory.turns),
        searches=trajectory.searches,
        tool_failures=trajectory.tool_failures,
        invalid_actions=trajectory.invalid_actions,
        prompt_tokens=len(trajectory.sample.prompt_ids),
        policy_tokens=trajectory.policy_length,
        read_tokens=read,
        seconds=round(seconds, 3),
        tool_seconds=round(sum(turn.tool_seconds for turn in trajectory.turns), 3),
    )
    answer = last_answer(trajectory.policy_text) if answered else None
    note = None if answered else explain_stop(trajectory, settings)
    if note is not None and not any(has_tag(turn.policy_text) for turn in trajectory.turns):
        note += NO_TAGS
    return Done(answer, trajectory.stop, note, stats, trajectory)


def explain_stop(trajectory: Trajectory, settings: AgentSettings) -> str:
    """Return why a trajectory has no answer, and which limit to raise."""
    if trajectory.stop == "turns":
        last = ", and the model did not answer in the one after them" if trajectory.forced_final else ""
        return f"all {settings.max_turns} turns with search are used{last} (agentloop.max_turns)"
    if trajectory.stop == "length":
        per_turn = settings.max_new_tokens_per_turn
        if per_turn is not None and trajectory.turns and trajectory.turns[-1].policy_tokens >= per_turn:
            return f"the last turn used all of its {per_turn} tokens (agentloop.max_new_tokens_per_turn)"
        left = settings.max_model_len - len(trajectory.sample.prompt_ids)
        if settings.sampling.max_new_tokens < left:
            limit = settings.sampling.max_new_tokens
            return f"the answer may have {limit} tokens, what was read included (algorithm.sampling_params.max_new_tokens)"
        return f"prompt and answer may have {settings.max_model_len} tokens, what was read included (runner.seq_length)"
    if trajectory.stop == "eos":
        return "the model ended its text without an answer"
    return "the generation was aborted"
