"""Flags that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from searchr1.chat.plan import ChatOptions, Plan, make_plan
from searchr1.config.choices import choices_of

Flags = argparse.ArgumentParser | argparse._ArgumentGroup


def add_address_flags(parser: Flags, port: int, saved: str | None = None) -> None:
    """Add --host and --port, and --save-address-to for a server that can be used from the moment `saved` on."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=port, help=f"0 takes a free one (default {port})")
    if saved is not None:
        parser.add_argument(
            "--save-address-to", help=f"write host:port into this file, or into a file in this folder, once {saved}"
        )


def add_host_names_flag(parser: Flags) -> None:
    """Add --allow-host, for a server that browsers use."""
    parser.add_argument(
        "--allow-host",
        "--allowed-host",
        "--allowed_host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name by which browsers may reach the server; IP addresses, localhost, the name of this machine and "
        "--host are accepted anyway",
    )


ONLINE_KEYS = "SERPER_API_KEY, SERPAPI_API_KEY, GOOGLE_API_KEY with GOOGLE_CSE_ID, BRAVE_API_KEY"


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the shared flags."""
    flags = argparse.ArgumentParser(
        prog=f"searchr1 {command}",
        description=description,
        epilog=f"Keys of online engines come from the environment: {ONLINE_KEYS}; a retrieval server's token from "
        "SEARCHR1_RETRIEVAL_TOKEN.",
    )
    model = flags.add_argument_group("model")
    model.add_argument("--model_path", "--model-path", help="Hugging Face folder (searchr1 convert makes one) or hub name")
    model.add_argument("--config", type=Path, help="config.yaml of a run, in place of the model's searchr1.json")
    model.add_argument("--device", choices=choices_of("cluster.device"), help="default: a GPU if there is one")
    model.add_argument(
        "--prompt_template", "--prompt-template", help="default: the run's, else searchr1 (see data.prompt_template)"
    )
    search = flags.add_argument_group("search")
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
    limits = flags.add_argument_group("limits and sampling (default: as the run was evaluated, that is greedily)")
    limits.add_argument("--max_turns", "--max-turns", type=int, help="turns that may search; a last one without follows")
    limits.add_argument("--max_new_tokens", "--max-new-tokens", type=int, help="tokens of an answer with all that is read")
    limits.add_argument("--seq_length", "--seq-length", type=int, help="tokens of prompt and answer together")
    limits.add_argument("--temperature", type=float, help="sample at this temperature; 0 is greedy")
    limits.add_argument("--seed", type=int, help="of sampling")
    flags.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration: agentloop.max_turns=6")
    return flags


def plan_of(args: argparse.Namespace) -> Plan:
    """Return the plan for parsed flags.

    Raises:
        UserError: flags that exclude each other, a bad file or value.
    """
    return make_plan(
        ChatOptions(
            model_path=args.model_path,
            config=args.config,
            overrides=args.overrides,
            device=args.device,
            prompt_template=args.prompt_template,
            retriever_url=args.retriever_url,
            engine=args.engine,
            engine_url=args.engine_url,
            snippet_only=args.snippet_only,
            search=not args.no_search,
            check=not args.no_check,
            access=args.access,
            topk=args.topk,
            max_turns=args.max_turns,
            max_new_tokens=args.max_new_tokens,
            seq_length=args.seq_length,
            temperature=args.temperature,
            seed=args.seed,
        )
    )
