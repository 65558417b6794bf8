"""`searchr1 serve-chat`: a web page that asks the model."""

from __future__ import annotations

import asyncio
import os
import sys

from searchr1.chat.server import Limits, is_loopback, serve
from searchr1.commands.flags import add_address_flags, add_host_names_flag, parser, plan_of
from searchr1.errors import UserError
from searchr1.retrieval.server.address import bind, reachable_address
from searchr1.retrieval.server.processes import exit_on_sigterm

TOKEN_VARIABLE = "SEARCHR1_CHAT_TOKEN"


def main(argv: list[str]) -> int:
    """Run the command until a signal comes; return its exit code."""
    flags = parser("serve-chat", "Serve a web page that asks a trained model and shows how it searches.")
    server = flags.add_argument_group("server", f"A token that questions need is taken from {TOKEN_VARIABLE}.")
    add_address_flags(server, 8080, saved="questions can be asked")
    add_host_names_flag(server)
    limits = Limits()
    for name, default, text in (
        ("max_question_characters", limits.question_characters, "characters of a question"),
        ("max_running", limits.running, "questions that are answered at once"),
        ("max_waiting", limits.waiting, "questions that may wait; more get 503"),
    ):
        server.add_argument(
            f"--{name}", f"--{name.replace('_', '-')}", type=int, default=default, help=f"{text} (default {default})"
        )
    server.add_argument(
        "--answer_timeout_s", "--answer-timeout-s", type=float, default=limits.answer_timeout_s, help="of one answer"
    )
    args = flags.parse_intermixed_args(argv)
    if min(args.max_question_characters, args.max_running, args.answer_timeout_s) <= 0 or args.max_waiting < 0:
        raise UserError(
            "--max_question_characters, --max_running and --answer_timeout_s must be above 0, --max_waiting at least 0"
        )
    plan = plan_of(args)
    listener = bind(args.host, args.port)
    address = reachable_address(args.host, listener.getsockname()[1])
    if not is_loopback(args.host) and not os.environ.get(TOKEN_VARIABLE):
        print(f"everybody who reaches {address} can ask; set {TOKEN_VARIABLE} to want a token", file=sys.stderr, flush=True)
    exit_on_sigterm()
    limits = Limits(args.max_question_characters, args.max_running, args.max_waiting, args.answer_timeout_s)
    token = os.environ.get(TOKEN_VARIABLE) or None
    hosts = [args.host, *args.allow_host]
    asyncio.run(serve(plan, limits, listener, hosts, address, args.save_address_to, token))
    return 0
