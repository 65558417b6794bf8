"""The conversation of `searchr1 chat`: lines from standard input, answers on a console."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text as Styled

from searchr1.chat.session import Chat
from searchr1.chat.terminal import Terminal, printable

HELP = """\
Type a question and press Enter; each question stands alone.
  /model     the model, its search and its limits
  /full      show all that the model reads, or only the beginning of each passage
  /history   the questions so far; an arrow key brings them back
  /quit      leave (or Ctrl-D)
Ctrl-C stops an answer that is being written."""


class Conversation:
    """Single questions and their answers in a terminal."""

    def __init__(self, chat: Chat, console: Console) -> None:
        self._chat = chat
        self._console = console
        self._questions: list[str] = []
        self._full = False

    def loop(self) -> None:
        """Read and answer until the input ends."""
        interactive = sys.stdin.isatty()
        if interactive:
            self._say(f"{self._chat.about['model']} · search: {self._chat.about['search']} · /help", "bright_black")
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
            self._say("\n".join(f"{name:<12} {value}" for name, value in self._chat.about.items()))
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
                for event in self._chat.stream(line):
                    terminal.show(event)
            except KeyboardInterrupt:  # leaving the iteration has aborted the engine's request
                terminal.stopped()

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Styled(printable(text), style), soft_wrap=True)
