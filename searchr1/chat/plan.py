"""From what a caller asks for (a model, a search, limits) to the configuration that a chat is loaded with."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from searchr1.config.choices import choice_problems
from searchr1.config.load import load_for_command
from searchr1.config.schema import Config, DeviceSetting
from searchr1.data.model_settings import TEMPLATE, ModelSettings, template_text, warn_of_differences
from searchr1.data.model_source import require_source
from searchr1.errors import UserError
from searchr1.preflight.check import check_agent
from searchr1.preflight.check_device import require_one_node

RECIPE = Path(__file__).with_name("recipe.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What a caller may choose; None leaves the choice to the run, the model or the recipe. Messages name these as flags."""

    model_path: str | None = None
    """Hugging Face folder or hub name."""
    config: Path | None = None
    """`config.yaml` of a run, in place of the model's `searchr1.json`."""
    overrides: Sequence[str] = ()
    """`key=value` of the configuration."""
    device: DeviceSetting | None = None
    prompt_template: str | None = None
    retriever_url: Sequence[str] | None = None
    """Retrieval servers."""
    engine: str | None = None
    """Online search engine, in place of a retrieval server."""
    engine_url: str | None = None
    """Address of a proxy of the online engine."""
    snippet_only: bool = False
    """Give the online engine's snippets without fetching pages."""
    search: bool = True
    """False: every search returns nothing."""
    check: bool = True
    """Check that the retrieval server answers."""
    access: bool = False
    """Let the model read pages with <access>."""
    topk: int | None = None
    max_turns: int | None = None
    max_new_tokens: int | None = None
    seq_length: int | None = None
    temperature: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to load."""

    config: Config
    """The run's or the recipe's configuration, with the caller's options."""
    auto_chat: bool
    """Whether the question is a chat message exactly if the model has a chat template; False: `data.apply_chat_template`."""
    auto_precision: bool
    """Whether the precision is not chosen: fp32 on a CPU."""
    auto_length: bool
    """Whether the length is not chosen: it is cut to what the model takes."""
    engine: str | None = None
    """Online search engine."""
    engine_url: str | None = None
    snippet_only: bool = False
    check: bool = True
    """Whether to check that the retrieval server answers."""


def make_plan(options: ChatOptions) -> Plan:
    """Return the run's configuration, or the recipe's, with the options on top.

    Raises:
        UserError: options that exclude each other, a bad file or value.
    """
    config = load_for_command(options.config or RECIPE, options.overrides)
    require_one_node(config)
    search = config.tools.search
    if options.model_path:
        config.rollout.model.model_path = options.model_path
    if not config.rollout.model.model_path:
        raise UserError("--model_path: is missing; give a Hugging Face folder or a hub name")
    require_source(config.rollout.model.model_path, "--model_path")
    chosen = {override.partition("=")[0].lstrip("+~") for override in options.overrides}
    settings = ModelSettings.of_model(config.rollout.model.model_path)
    if settings is not None and options.config is None:
        settings.apply(config, chosen)
        print(f"{settings.path}: {settings.described()}", file=sys.stderr)
    if options.device:
        config.cluster.device = options.device
    if sum(map(bool, (options.retriever_url, options.engine, not options.search))) > 1:
        raise UserError("--retriever-url, --engine and --no-search: give one of them")
    if not options.engine and (options.engine_url or options.snippet_only):
        raise UserError("--engine_url and --snippet_only: need --engine")
    if options.retriever_url:
        search.server_addr = list(options.retriever_url)
        search.dummy_mode = False
    search.dummy_mode = (search.dummy_mode and not options.engine) or not options.search
    if options.access:
        config.tools.access.enabled = True
    for flag, section, name in (
        ("topk", search, "topk"),
        ("max_turns", config.agentloop, "max_turns"),
        ("max_new_tokens", config.algorithm.sampling_params, "max_new_tokens"),
        ("seq_length", config.runner, "seq_length"),
        ("seed", config.runner, "seed"),
    ):
        value = getattr(options, flag)
        if value is not None:
            if value < (0 if flag in ("max_turns", "seed") else 1):
                raise UserError(f"--{flag} {value}: is too small")
            setattr(section, name, value)
    _set_sampling(config, options)
    names_template = _set_template(config, options, settings)
    if settings is not None:
        warn_of_differences(settings, config)
    for part in ("agentloop", "rollout", "cluster"):
        for key, message in choice_problems(getattr(config, part), f"{part}."):
            raise UserError(key, message)
    unread = next(check_agent(config), None)
    if unread is not None:
        raise UserError(f"{unread.key}: {unread.message}")
    has_length = settings is not None and "runner.seq_length" in settings.values
    return Plan(
        config=config,
        auto_chat=not (names_template or "data.apply_chat_template" in chosen),
        auto_precision=options.config is None and "rollout.model.precision" not in chosen,
        auto_length=options.config is None
        and options.seq_length is None
        and not has_length
        and "runner.seq_length" not in chosen,
        engine=options.engine,
        engine_url=options.engine_url,
        snippet_only=options.snippet_only,
        check=options.check,
    )


def _set_sampling(config: Config, options: ChatOptions) -> None:
    """Sample greedily as in evaluation, unless a temperature is given."""
    algorithm = config.algorithm
    if options.temperature is not None:
        if not 0 <= options.temperature < math.inf:
            raise UserError(f"--temperature {options.temperature:g}: must be a number from 0 on")
        base = dataclasses.replace(algorithm.eval_sampling_params or algorithm.sampling_params)
        base.do_sample, base.temperature = options.temperature > 0, options.temperature or 1.0
        algorithm.eval_sampling_params = base
    if options.max_new_tokens is not None and algorithm.eval_sampling_params is not None:
        algorithm.eval_sampling_params.max_new_tokens = options.max_new_tokens


def _set_template(config: Config, options: ChatOptions, settings: ModelSettings | None) -> bool:
    """Choose the template; return whether the run, or the model, itself names how a question becomes its prompt."""
    data = config.data
    source = options.config or (settings.path if settings is not None and TEMPLATE in settings.values else None)
    run = data.prompt_template if source and data.prompt_template != "none" else None
    if options.prompt_template:
        data.prompt_template = options.prompt_template
    elif source and run is None:
        data.prompt_template = "searchr1"
        print(
            f"{source}: names no data.prompt_template (its rows carried whole prompts); a question is put into the "
            "template searchr1; --prompt_template takes another",
            file=sys.stderr,
        )
    template_text(data.prompt_template)  # an unknown one is reported now
    return run is not None and run == data.prompt_template
