"""What an evaluation has to do: the questions and prompts of each method, and which of them are finished."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from searchr1.agent.protocol import Document, InformationStyle, render_body, truncate_text
from searchr1.agent.settings import AgentSettings
from searchr1.agent.tools import as_document
from searchr1.agent.trajectory import Sample
from searchr1.config.load import save_config
from searchr1.config.schema import Config, DataConfig, SearchToolConfig
from searchr1.data.dataset import TOKENIZE_ROWS, load_data, load_tokenizer
from searchr1.data.model_settings import TEMPLATE, ModelSettings, warn_of_differences
from searchr1.data.paths import EVALUATION, find_files, path_problem
from searchr1.data.prompts import has_chat_template, render_prompt
from searchr1.data.questions import is_rendered, question_column, read_prompt
from searchr1.data.reading import read_rows
from searchr1.errors import UserError
from searchr1.evaluation.ledger import Ledger
from searchr1.evaluation.manifest import manifest
from searchr1.evaluation.methods import METHODS, Method, agent_settings
from searchr1.retrieval.client.client import SearchClient, SearchUnavailable, server_addresses
from searchr1.retrieval.client.outages import OutageWatch
from searchr1.tracking.eval_progress import EvalProgress
from searchr1.tracking.run_path import run_path
from searchr1.tracking.token_text import load_token_text

QUERIES_PER_CALL = 32
CALLS_AT_ONCE = 8


def require_server(config: Config) -> None:
    """Search once, so that a server that is down or slow is reported before a model is loaded.

    Raises:
        UserError: it does not answer.
    """
    asyncio.run(_search(config.tools.search, ["Who wrote the first encyclopedia?"], lambda count: None))


def watch_servers(config: Config, searched: bool = True) -> OutageWatch:
    """Report while the block runs that a retrieval server does not answer; there is none to watch without searches.

    A loop of one's own need not search: it misses a server only after that has answered once.
    """
    search = config.tools.search
    servers = server_addresses(search) if searched and not search.dummy_mode else []
    return OutageWatch(servers, search.timeout_s, awaited=config.agentloop.generate_fn is None)


def retrieve_passages(
    config: Config, style: InformationStyle, questions: Sequence[str], progress: Callable[[int], None]
) -> list[str]:
    """Return the passages for each question, rendered as the search tool shows them, without its tags.

    Args:
        config: with the server's address and the number of passages in `tools.search`.
        style: how documents are shown.
        questions: the queries.
        progress: called with the number of questions that got theirs.

    Raises:
        UserError: the server does not answer.
    """
    results = asyncio.run(_search(config.tools.search, questions, progress))
    return [render_body([documents], style, config.agentloop.no_results_message) for documents in results]


async def _search(search: SearchToolConfig, queries: Sequence[str], progress: Callable[[int], None]) -> list[list[Document]]:
    """Search with one client for the whole list: `QUERIES_PER_CALL` queries a call, `CALLS_AT_ONCE` calls at once."""
    client = SearchClient.from_config(search)
    slots = asyncio.Semaphore(CALLS_AT_ONCE)
    results: list[list[Document]] = [[] for _ in queries]

    async def one_call(start: int) -> None:
        part = queries[start : start + QUERIES_PER_CALL]
        async with slots:
            answers = await client.search(part)
        for place, documents in enumerate(answers, start=start):
            results[place] = [as_document(document) for document in documents]
        progress(len(part))

    try:
        with OutageWatch(server_addresses(search), search.timeout_s):
            async with asyncio.TaskGroup() as calls:
                for start in range(0, len(queries), QUERIES_PER_CALL):
                    calls.create_task(one_call(start))
    except ExceptionGroup as errors:
        first = errors.exceptions[0]
        if not isinstance(first, SearchUnavailable):
            raise first from None
        raise UserError(
            f"tools.search.server_addr: {first}. Start the retrieval server "
            "(searchr1 retrieval-server), or raise tools.search.timeout_s"
        ) from None
    finally:
        await client.aclose()
    return results


logger = logging.getLogger(__name__)

RESULT_FILES = ("results.json", "results.md", "results.html", "eval.json")
OLDER = ("trajectories", "tensorboard", "metrics.jsonl")
"""What an evaluation of an earlier version left."""


@dataclass(slots=True)
class Task:
    """One method."""

    method: Method
    folder: Path
    settings: AgentSettings
    samples: list[Sample]
    """All questions; `index` is their place. Prompts that hold passages are filled in by `add_passages`."""
    ledger: Ledger

    @property
    def pending(self) -> list[Sample]:
        """Questions that are not finished."""
        return [sample for sample in self.samples if sample.index not in self.ledger.finished]


@dataclass(slots=True)
class Questions:
    """The rows of `data.val_data_paths`."""

    samples: list[Sample]
    tokenizer: Any
    chat: bool
    """Whether prompts are chat messages."""
    described: str


def follow_model(config: Config, given: Set[str]) -> None:
    """Take from the model's searchr1.json what the YAML leaves out, and report both that and where the YAML differs.

    Args:
        config: changed in place.
        given: keys that the YAML sets.

    Raises:
        UserError: the file cannot be used.
    """
    settings = ModelSettings.of_model(config.rollout.model.model_path)
    if settings is None:
        return
    print(f"{settings.path}: {settings.described()}; it counts where the YAML says nothing", flush=True)
    if settings.values.get(TEMPLATE) is not None and TEMPLATE not in given and _has_prompts_only(config.data):
        given = given | {TEMPLATE, "data.apply_chat_template"}
        print(f"{TEMPLATE}: the rows have prompts of their own and no question beside them; these are used", flush=True)
    settings.apply(config, given)
    warn_of_differences(settings, config)


def _has_prompts_only(data: DataConfig) -> bool:
    """Return whether the first row has a prompt, but no question that a template could be filled with."""
    if not data.val_data_paths or path_problem(data.val_data_paths[0]) is not None:  # reported by the checks
        return False
    row = _first_row(data)
    return row.get(data.prompt_key) is not None and question_column(row) is None


def load_questions(config: Config) -> Questions:
    """Return the questions, with the search loop's prompts if it is among the methods.

    Raises:
        UserError: a file or a row cannot be used.
    """
    data = config.data
    searches = "search" in config.evaluation.methods
    if not searches:
        # Rows need not have a prompt then: each method makes its own.
        data = replace(data, prompt_template="direct")
    loaded = load_data(replace(config, data=data), training=False, prompts=searches)
    samples = [replace(s, index=index) for index, s in enumerate(loaded.val)]
    if judged(config):
        # The judge is part of the configured reward; a row's own would go before it.
        samples = [replace(sample, reward_name=None) for sample in samples]
    tokenizer = load_tokenizer(config)
    shown_as_chat = config.data.prompt_template in (None, "none") and has_chat_template(tokenizer)
    chat = data.apply_chat_template or (shown_as_chat and _has_chat_prompts(data))
    return Questions(samples, tokenizer, chat, str(loaded.val_stats))


def _has_chat_prompts(data: DataConfig) -> bool:
    """Return whether the first row's prompt is chat messages, or was rendered from them."""
    prompt = read_prompt(_first_row(data).get(data.prompt_key), data.prompt_key)
    return isinstance(prompt, list) or (isinstance(prompt, str) and is_rendered(prompt))


def _first_row(data: DataConfig) -> dict[str, Any]:
    (first, *_) = find_files(data.val_data_paths[:1], EVALUATION)
    return next(read_rows(first.path))[1]


def evaluation_path(config: Config) -> Path:
    """`{runner.output_dir}/{runner.experiment_name}`; nothing is written.

    Raises:
        UserError: a training run is in there, or an evaluation that cannot be gone on with; it cannot be written.
    """
    path = run_path(config)
    if (path / "checkpoints").exists():
        raise UserError(f"runner.experiment_name: {path} holds a training run; give the evaluation another name")
    if (path / "metrics.jsonl").exists() and not config.runner.overwrite:
        raise UserError(
            f"runner.experiment_name: {path} already holds a run; give another name, or set runner.overwrite=True to write "
            "over it"
        )
    return path


def begin(config: Config, folder: Path, tasks: Sequence[Task]) -> None:
    """Start to write, once nothing rejects the evaluation any more: earlier answers go if `runner.overwrite`.

    Raises:
        UserError: the folder cannot be written.
    """
    if config.runner.overwrite:
        for name in (*METHODS, *OLDER):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (*RESULT_FILES, *OLDER):
            if (folder / name).is_file():
                (folder / name).unlink()
    for task in tasks:
        task.ledger.begin()
    save_config(config, folder / "config.yaml")


def open_tasks(config: Config, folder: Path, questions: Questions) -> list[Task]:
    """Return a task per method, each with what was finished before; nothing is written.

    Raises:
        UserError: a folder holds answers of something else, prompts do not fit.
    """
    tasks: list[Task] = []
    token_text = load_token_text(config.rollout.model.model_path)
    try:
        for name in config.evaluation.methods:
            method = METHODS[name]
            settings = agent_settings(config, method)
            samples = questions.samples
            if not method.searches and not method.retrieves:
                samples = _with_prompts(config, method, questions, samples, None)
            made_with = manifest(config, method, settings, samples)
            ledger = Ledger.open(folder / name, made_with, token_text, anew=config.runner.overwrite)
            tasks.append(Task(method, folder / name, settings, samples, ledger))
    except BaseException:
        for task in tasks:
            task.ledger.close()
        raise
    return tasks


def add_passages(config: Config, task: Task, questions: Questions) -> list[Sample]:
    """Return the pending questions with passages in their prompts, cut to `agentloop.max_tool_response_length` tokens each.

    Raises:
        UserError: the server does not answer, prompts do not fit.
    """
    pending = task.pending
    with EvalProgress(f"{task.method.name}: passages", len(pending)) as bar:
        style = task.settings.information_style
        passages = retrieve_passages(config, style, [sample.question for sample in pending], bar.advance)
    tokenizer, settings = questions.tokenizer, task.settings
    limit, side = settings.max_tool_response_length, settings.truncate_side
    cut = [truncate_text(text, tokenizer, limit, side) for text in passages]
    return _with_prompts(config, task.method, questions, pending, cut)


def judged(config: Config) -> bool:
    """Return whether a judge is asked."""
    reward = config.reward
    return config.evaluation.judge or "judge" in (reward.weights or {reward.reward_type})


def with_judge(config: Config) -> Config:
    """Return the configuration whose reward also holds the judge's verdict, if one is asked for."""
    if not judged(config):
        return config
    weights = dict(config.reward.weights) or {config.reward.reward_type: 1.0}
    return replace(config, reward=replace(config.reward, weights={"judge": 0.0} | weights))


def _with_prompts(
    config: Config, method: Method, questions: Questions, samples: Sequence[Sample], passages: list[str] | None
) -> list[Sample]:
    """Return the samples with a method's own prompts."""
    texts = []
    for number, sample in enumerate(samples):
        shown = passages[number] if passages is not None else None
        texts.append(render_prompt(None, sample.question, questions.tokenizer, method.template, questions.chat, shown))
    ids: list[list[int]] = []
    for start in range(0, len(texts), TOKENIZE_ROWS):
        ids += questions.tokenizer(texts[start : start + TOKENIZE_ROWS], add_special_tokens=False)["input_ids"]
    limit = config.data.max_prompt_length
    too_long = [len(prompt) for prompt in ids if len(prompt) > limit]
    if too_long:
        raise UserError(
            f"data.max_prompt_length: {len(too_long)} prompts of {method.title} are longer than {limit} tokens (the longest "
            f"has {max(too_long)}); raise it (and runner.seq_length with it), so that all methods answer the same questions"
        )
    return [replace(sample, prompt_ids=prompt) for sample, prompt in zip(samples, ids, strict=True)]
