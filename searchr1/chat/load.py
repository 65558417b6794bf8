"""From a plan to a loaded chat."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

from searchr1.agent.settings import AgentSettings
from searchr1.agent.tools import AccessTool, DummySearchTool, FailureMonitor, SearchBackend, SearchTool, Tool
from searchr1.chat.async_chat import AsyncChat, PromptSettings
from searchr1.chat.plan import Plan
from searchr1.chat.search_backends import OnlineBackend, check_servers
from searchr1.config.schema import Config
from searchr1.data import model_source
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.preflight.check_backend import without_adapters
from searchr1.preflight.check_device import require_precision
from searchr1.preflight.check_models import positions_of
from searchr1.retrieval.client.client import SearchClient, server_addresses

PLAIN_TEMPLATES = ("demo",)
"""Never put into a chat message: the demo models' chat template adds the same text."""


async def open_chat(plan: Plan) -> AsyncChat:
    """Check the search backend and load the model.

    Raises:
        UserError: the retrieval server does not answer, the model cannot be used, a limit does not fit it.
    """
    config = plan.config
    backend = await open_search_backend(plan)
    quieten()
    device = Device.detect(config.cluster.device)
    os.environ.update(device.driver_env() | device.worker_env("rollout"))

    from searchr1.agent.loop import resolve_generate_fn
    from searchr1.checkpoints.model_folder import verify_weights
    from searchr1.checkpoints.weight_check import check_model_folder
    from searchr1.rollout.engine import Engine, EngineError
    from searchr1.rollout.settings import EngineSettings

    path = config.rollout.model.model_path
    if plan.auto_precision and not device.is_cuda:
        config.rollout.model.precision = "fp32"
    for text in require_precision(config, device):
        print(f"warning: {text}", file=sys.stderr)
    tokenizer = load_tokenizer(path)
    fit_to_model(config, plan.auto_length)
    try:
        verify_weights(path)
        check_model_folder(path, trained=False)
    except UserError as error:
        raise UserError(f"--model_path {error}") from error
    print(f"loading {path}", file=sys.stderr, flush=True)
    try:
        engine = await Engine.start(path, device, EngineSettings.from_config(without_adapters(config)))
    except EngineError as error:
        raise UserError(f"--model_path {path}: cannot be loaded ({error})") from error
    settings = AgentSettings.from_config(config, "eval")
    return AsyncChat(
        engine=engine,
        tokenizer=tokenizer,
        tools=build_tools(config, backend),
        backend=backend,
        settings=settings,
        prompt=prompt_settings(plan, tokenizer),
        run=resolve_generate_fn(config.agentloop.generate_fn),
        seed=config.runner.seed,
        about={
            "model": path,
            "search": about_search(plan),
            "template": config.data.prompt_template,
            "max_turns": settings.max_turns,
            "seq_length": settings.max_model_len,
            "sampling": "greedy" if settings.sampling.temperature == 0 else f"temperature {settings.sampling.temperature:g}",
        },
    )


def quieten() -> None:
    """Quieten torch and vLLM before they are imported: waiting threads do not spin, standard output is left to answers, and
    messages for developers stay off the screen (VLLM_LOGGING_LEVEL=INFO shows them)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())  # for messages before it has read that
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\..*")


async def open_search_backend(plan: Plan) -> SearchBackend | None:
    """Return the search backend, None without search.

    Raises:
        UserError: the server does not answer, and nobody agrees to go on without it.
    """
    search = plan.config.tools.search
    if plan.engine:
        return OnlineBackend(plan.engine, search.topk, search.timeout_s, plan.engine_url, plan.snippet_only)
    if search.dummy_mode:
        return None
    backend = SearchClient.from_config(search)
    problem = await check_servers(search) if plan.check else None
    if problem is not None:
        if not confirm_without_search(problem):
            raise UserError(
                f"--retriever-url {', '.join(server_addresses(search))}: {problem}. Start the retrieval server (searchr1 "
                "retrieval-server), give its address, take --engine for an online engine, --no-search to do without, or "
                "--no-check if it is still to come"
            )
        search.dummy_mode = True
        await backend.aclose()
        return None
    return backend


def confirm_without_search(problem: str) -> bool:
    """Ask the person at the terminal, if there is one, whether to go on without search."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"The search does not work: {problem}\nGo on without it? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def build_tools(config: Config, backend: SearchBackend | None) -> dict[str, Tool]:
    """Return the tools of the run; failures are reported to the model and to the person, and end nothing."""
    settings = AgentSettings.from_config(config, "eval")
    style, no_results_message = settings.information_style, settings.no_results_message
    if backend is None:
        return {"search": DummySearchTool(style, no_results_message)}
    monitor = FailureMonitor(1.0, "search")
    tools: dict[str, Tool] = {"search": SearchTool(backend, style, monitor, no_results_message)}
    if config.tools.access.enabled:
        tools["access"] = AccessTool(backend, monitor)
    return tools


def about_search(plan: Plan) -> str:
    """Return where the model searches, for people."""
    search = plan.config.tools.search
    return plan.engine or ("off" if search.dummy_mode else ", ".join(server_addresses(search)))


def prompt_settings(plan: Plan, tokenizer: Any) -> PromptSettings:
    """Return the prompt settings of the run, or of Search-R1's rows: a chat message where the model has a chat template."""
    data = plan.config.data
    template, chat = data.prompt_template or "none", data.apply_chat_template
    if plan.auto_chat:
        chat = bool(getattr(tokenizer, "chat_template", None)) and template not in PLAIN_TEMPLATES
    return PromptSettings(template, chat, data.max_prompt_length)


def load_tokenizer(path: str) -> Any:
    """Return the model's tokenizer.

    Raises:
        UserError: there is none.
    """
    return model_source.load_tokenizer(path, "--model_path")


def fit_to_model(config: Config, may_cut: bool) -> None:
    """Cut the recipe's lengths to what the model can take, unless they were asked for.

    Raises:
        UserError: lengths that were asked for are longer.
    """
    path = config.rollout.model.model_path
    positions = positions_of(model_source.load_model_config(path, "--model_path").to_dict())
    runner, data = config.runner, config.data
    if positions is not None and runner.seq_length > positions:
        if not may_cut:
            raise UserError(
                f"--seq_length {runner.seq_length}: {path} has {positions} positions; give --seq_length {positions} or less"
            )
        runner.seq_length = positions
    if data.max_prompt_length >= runner.seq_length:
        data.max_prompt_length = runner.seq_length // 2
