"""The flags that `searchr1 infer`, `chat` and `serve-chat` share, and the configuration that they make."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from searchr1.config.load import load_for_command
from searchr1.config.schema import Config
from searchr1.data.model_settings import TEMPLATE, ModelSettings, warn_of_differences
from searchr1.data.model_source import require_source
from searchr1.data.prompts import template_text
from searchr1.errors import UserError
from searchr1.preflight.check import CHOICES, check_agent, value_of
from searchr1.preflight.check_device import require_one_node

RECIPE = Path(__file__).parents[1] / "chat/recipe.yaml"
ONLINE_KEYS = "SERPER_API_KEY, SERPAPI_API_KEY, GOOGLE_API_KEY with GOOGLE_CSE_ID, BRAVE_API_KEY"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be loaded."""

    config: Config
    """The run's or the recipe's, flags included."""
    auto_chat: bool
    """The question is a chat message where the model has a chat template; False goes by `data.apply_chat_template`."""
    auto_precision: bool
    """Nobody chose a precision: fp32 on a CPU."""
    auto_length: bool
    """Nobody chose a length: cut it to what the model takes."""
    engine: str | None = None
    """Online engine."""
    engine_url: str | None = None
    snippet_only: bool = False
    check: bool = True
    """See that the retrieval server answers."""


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the shared flags."""
    found = argparse.ArgumentParser(
        prog=f"searchr1 {command}",
        description=description,
        epilog=f"Keys of online engines come from the environment: {ONLINE_KEYS}; a retrieval server's token from "
        "SEARCHR1_RETRIEVAL_TOKEN.",
    )
    model = found.add_argument_group("model")
    model.add_argument("--model_path", "--model-path", help="Hugging Face folder (searchr1 convert makes one) or hub name")
    model.add_argument("--config", type=Path, help="config.yaml of a run, in place of the model's searchr1.json")
    model.add_argument("--device", choices=CHOICES["cluster.device"], help="default: a GPU if there is one")
    model.add_argument(
        "--prompt_template", "--prompt-template", help="default: the run's, else searchr1 (see data.prompt_template)"
    )
    search = found.add_argument_group("search")
    search.add_argument(
        "--retriever-url", "--retriever_url", action="append", metavar="URL", help="retrieval server; may be given again"
    )
    search.add_argument("--engine", help="an online engine instead: serper, serpapi-google, serpapi-bing, google, brave")
    search.add_argument("--engine_url", "--engine-url", help="address of a proxy of the engine")
    search.add_argument("--snippet_only", "--snippet-only", action="store_true", help="give the engine's snippets, no pages")
    search.add_argument("--no-search", "--no_search", action="store_true", help="every search finds nothing")
    search.add_argument("--no-check", "--no_check", action="store_true", help="start even if the server does not answer yet")
    search.add_argument("--access", action="store_true", help="let the model read pages with <access>")
    search.add_argument("--topk", type=int, help="passages per query")
    limits = found.add_argument_group("limits and sampling (default: as the run was evaluated, that is greedily)")
    limits.add_argument("--max_turns", "--max-turns", type=int, help="turns that may search; a last one without follows")
    limits.add_argument("--max_new_tokens", "--max-new-tokens", type=int, help="tokens of an answer with all that is read")
    limits.add_argument("--seq_length", "--seq-length", type=int, help="tokens of prompt and answer together")
    limits.add_argument("--temperature", type=float, help="sample at this temperature; 0 is greedy")
    limits.add_argument("--seed", type=int, help="of sampling")
    found.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration: agentloop.max_turns=6")
    return found


def plan(args: argparse.Namespace) -> Plan:
    """What the flags ask for: the run's configuration, or the recipe's, with the flags on top.

    Raises:
        UserError: flags that do not go together, a bad file or value.
    """
    config = load_for_command(args.config or RECIPE, args.overrides)
    require_one_node(config)
    search = config.tools.search
    if args.model_path:
        config.rollout.model.model_path = args.model_path
    if not config.rollout.model.model_path:
        raise UserError("--model_path: is missing; give a Hugging Face folder or a hub name")
    require_source(config.rollout.model.model_path, "--model_path")
    chosen = {override.partition("=")[0].lstrip("+~") for override in args.overrides}
    settings = ModelSettings.of_model(config.rollout.model.model_path)
    if settings is not None and args.config is None:
        settings.apply(config, chosen)
        print(f"{settings.path}: {settings.described()}", file=sys.stderr)
    if args.device:
        config.cluster.device = args.device
    if sum(map(bool, (args.retriever_url, args.engine, args.no_search))) > 1:
        raise UserError("--retriever-url, --engine and --no-search: give one of them")
    if not args.engine and (args.engine_url or args.snippet_only):
        raise UserError("--engine_url and --snippet_only: need --engine")
    if args.retriever_url:
        search.server_addr = args.retriever_url
        search.dummy_mode = False
    search.dummy_mode = (search.dummy_mode and not args.engine) or args.no_search
    if args.access:
        config.tools.access.enabled = True
    for flag, section, name in (
        ("topk", search, "topk"),
        ("max_turns", config.agentloop, "max_turns"),
        ("max_new_tokens", config.algorithm.sampling_params, "max_new_tokens"),
        ("seq_length", config.runner, "seq_length"),
        ("seed", config.runner, "seed"),
    ):
        value = getattr(args, flag)
        if value is not None:
            if value < (0 if flag in ("max_turns", "seed") else 1):
                raise UserError(f"--{flag} {value}: is too small")
            setattr(section, name, value)
    _set_sampling(config, args)
    names_template = _set_template(config, args, settings)
    if settings is not None:
        warn_of_differences(settings, config)
    problems = [key for key, allowed in CHOICES.items() if key.startswith(("agentloop.", "rollout.", "cluster.")) and
                value_of(config, key) not in allowed]  # fmt: skip
    if problems:
        raise UserError(f"{problems[0]}: {value_of(config, problems[0])!r} is not one of {CHOICES[problems[0]]}")
    unread = next(check_agent(config), None)
    if unread is not None:
        raise UserError(f"{unread.key}: {unread.message}")
    has_length = settings is not None and "runner.seq_length" in settings.values
    return Plan(
        config=config,
        auto_chat=not (names_template or "data.apply_chat_template" in chosen),
        auto_precision=args.config is None and "rollout.model.precision" not in chosen,
        auto_length=args.config is None and args.seq_length is None and not has_length and "runner.seq_length" not in chosen,
        engine=args.engine,
        engine_url=args.engine_url,
        snippet_only=args.snippet_only,
        check=not args.no_check,
    )


def _set_sampling(config: Config, args: argparse.Namespace) -> None:
    """Greedy as in evaluation, unless a temperature is given."""
    algorithm = config.algorithm
    if args.temperature is not None:
        if not 0 <= args.temperature < math.inf:
            raise UserError(f"--temperature {args.temperature:g}: must be a number from 0 on")
        base = dataclasses.replace(algorithm.eval_sampling_params or algorithm.sampling_params)
        base.do_sample, base.temperature = args.temperature > 0, args.temperature or 1.0
        algorithm.eval_sampling_params = base
    if args.max_new_tokens is not None and algorithm.eval_sampling_params is not None:
        algorithm.eval_sampling_params.max_new_tokens = args.max_new_tokens


def _set_template(config: Config, args: argparse.Namespace, settings: ModelSettings | None) -> bool:
    """Choose the template. True if the run, or the model, itself says how a question becomes its prompt."""
    data = config.data
    source = args.config or (settings.path if settings is not None and TEMPLATE in settings.values else None)
    run = data.prompt_template if source and data.prompt_template != "none" else None
    if args.prompt_template:
        data.prompt_template = args.prompt_template
    elif source and run is None:
        data.prompt_template = "searchr1"
        print(
            f"{source}: names no data.prompt_template (its rows carried whole prompts); a question is put into the "
            "template searchr1; --prompt_template takes another",
            file=sys.stderr,
        )
    template_text(data.prompt_template)  # an unknown one is reported now
    return run is not None and run == data.prompt_template
