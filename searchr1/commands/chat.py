"""`searchr1 chat`: questions and answers in a terminal."""

from __future__ import annotations

from contextlib import suppress

from rich.console import Console

from searchr1.chat.load import open_chat
from searchr1.chat.session import Chat
from searchr1.chat.terminal import Conversation
from searchr1.commands.flags import parser, plan_of


def main(argv: list[str]) -> int:
    """Run the command until the input ends; return its exit code."""
    flags = parser("chat", "Ask a trained model that searches, question by question, in the terminal.")
    plan = plan_of(flags.parse_intermixed_args(argv))
    with suppress(ImportError):  # line editing and arrow keys, where Python has them
        import readline  # noqa: F401
    with Chat(lambda: open_chat(plan)) as chat:
        Conversation(chat, Console(highlight=False, markup=False, emoji=False)).loop()
    return 0
