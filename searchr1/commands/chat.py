"""`searchr1 chat`: questions and answers in a terminal."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing, suppress

from rich.console import Console
from rich.text import Text as Styled

from searchr1.chat.session import Session
from searchr1.chat.terminal import Terminal, printable
from searchr1.commands.chat_flags import parser, plan_of

HELP = """\
Type a question and press Enter; each question stands alone.
  /model     the model, its search and its limits
  /full      show all that the model reads, or only the beginning of each passage
  /history   the questions so far; an arrow key brings them back
  /quit      leave (or Ctrl-D)
Ctrl-C stops an answer that is being written."""


class Chat:
    """A conversation of single questions."""

    def __init__(self, session: Session, console: Console, runner: asyncio.Runner) -> None:
        self._session = session
        self._console = console
        self._runner = runner
        self._questions: list[str] = []
        self._full = False

    def loop(self) -> None:
        """Read and answer until the input ends."""
        interactive = sys.stdin.isatty()
        if interactive:
            self._say(f"{self._session.about['model']} · search: {self._session.about['search']} · /help", "bright_black")
        while True:
            try:
                line = input("\n> " if interactive else "")
            except EOFError:
                break
            except UnicodeDecodeError:
                self._say("that line is no text in UTF-8", "yellow")
                continue
            except KeyboardInterrupt:
                self._say("\n(/quit or Ctrl-D to leave)", "bright_black")
                continue
            if line.strip() in ("/quit", "/exit", "/q"):
                break
            if line.strip():
                self._take(line.strip(), interactive)
        if interactive:
            self._console.print()

    def _take(self, line: str, interactive: bool) -> None:
        if line == "/help":
            self._say(HELP)
        elif line == "/model":
            self._say("\n".join(f"{name:<12} {value}" for name, value in self._session.about.items()))
        elif line == "/full":
            self._full = not self._full
            self._say("all that the model reads" if self._full else "the beginning of each passage")
        elif line == "/history":
            self._say("\n".join(self._questions) or "no questions yet")
        elif line.startswith("/") and " " not in line:
            self._say(f"no command {line}; /help names them", "yellow")
        else:
            if not interactive:
                self._say(f"> {line}")
            self._questions.append(line)
            terminal = Terminal(self._console, full=self._full)
            try:
                self._runner.run(self._answer(line, terminal))
            except KeyboardInterrupt:  # the runner has cancelled the answer, and with it the engine's request
                terminal.stopped()

    async def _answer(self, question: str, terminal: Terminal) -> None:
        async with aclosing(self._session.ask(question)) as events:
            async for event in events:
                terminal.show(event)

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Styled(printable(text), style), soft_wrap=True)


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    from searchr1.chat.load import open_session

    flags = parser("chat", "Ask a trained model that searches, question by question, in the terminal.")
    args = flags.parse_intermixed_args(argv)
    chosen = plan_of(args)
    with suppress(ImportError):  # line editing and arrow keys, where Python has them
        import readline  # noqa: F401
    with asyncio.Runner() as runner:
        session = runner.run(open_session(chosen))
        try:
            Chat(session, Console(highlight=False, markup=False, emoji=False), runner).loop()
        finally:
            runner.run(session.aclose())
    return 0
