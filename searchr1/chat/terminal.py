"""The conversation of `searchr1 chat`: lines from standard input, events as lines of a terminal or of a pipe."""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.text import Text as Styled

from searchr1.chat.events import (
    Done,
    Event,
    Failed,
    InvalidAction,
    Read,
    Stats,
    Text,
    ToolCalled,
    ToolFailed,
    ToolReturned,
    TurnStarted,
)
from searchr1.chat.session import Chat
from searchr1.files.text_rows import whole_text

STYLES = {
    "think": "italic bright_black",
    "search": "bold cyan",
    "access": "bold cyan",
    "information": "yellow",
    "answer": "bold green",
    "text": "",
}
LABELS = {
    "think": "think",
    "search": "search",
    "access": "open",
    "information": "made up",
    "answer": "answer",
    "text": "text",
}
LABEL_WIDTH = 9
SNIPPET = 240
# Everything that moves a cursor, changes colours or hides text: what models and pages write goes to the screen as text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return text without control characters; line breaks and tabs stay."""
    return whole_text(_CONTROL.sub("", text.replace("\r\n", "\n")))


def _indented(text: str) -> str:
    """Indent further lines to below the first, behind the label."""
    return re.sub(r"\n(?=[^\n])", "\n" + " " * LABEL_WIDTH, printable(text))


class Terminal:
    """A writer of one question's events, as they come."""

    def __init__(self, console: Console, *, full: bool = False) -> None:
        """Write to `console`; `full` shows the text that the model was given, in place of the beginning of each passage."""
        self._console = console
        self._full = full
        self._block: str | None = None
        self._at_start = True

    def show(self, event: Event) -> None:
        """Write one event."""
        match event:
            case Text():
                self._text(event.block, event.text)
            case ToolReturned() if not self._full:
                self._passages(event)
            case Read() if self._full:
                self._line("read", event.text.strip(), "bright_black")
            case ToolCalled() if len(event.arguments) > 1:
                self._line("", f"{len(event.arguments)} queries: " + " | ".join(event.arguments), "cyan")
            case ToolFailed():
                self._line("", f"{event.action} failed: {event.message}", "red")
            case InvalidAction():
                message = "; the model was given a message about that" if event.text.strip() else ""
                self._line("", f"neither a search nor an answer{message}", "yellow")
            case Done():
                self._end()
                if event.note:
                    self._line("", f"no answer: {event.note}", "yellow")
                self._line("", describe(event.stats), "bright_black")
            case Failed():
                self._line("error", event.message, "bold red")
            case TurnStarted():
                self._end()

    def stopped(self) -> None:
        """Report that the person stopped the generation."""
        self._line("", "stopped", "yellow")

    def _text(self, block: str, text: str) -> None:
        if self._block != block:
            self._end()
            self._label(LABELS[block])
            self._block = block
        self._console.print(Styled(_indented(text), STYLES[block]), end="", soft_wrap=True)

    def _passages(self, event: ToolReturned) -> None:
        count = sum(map(len, event.results))
        noun = ("passage" if event.action == "search" else "page") + ("" if count == 1 else "s")
        self._line("", f"{count} {noun} in {event.seconds * 1000:.0f} ms", "bright_black")
        for number, passage in enumerate((p for results in event.results for p in results), start=1):
            text = " ".join(printable(passage.text).split())
            snippet = text[:SNIPPET] + ("…" if len(text) > SNIPPET else "")
            head = Styled(f"{number:>{LABEL_WIDTH + 1}}. ").append(printable(passage.title) or "(no title)", "bold")
            if passage.url:
                head.append("  " + printable(passage.url), "blue")
            self._console.print(head, soft_wrap=True)
            self._console.print(Styled(" " * (LABEL_WIDTH + 3) + snippet, "bright_black"), soft_wrap=True)

    def _line(self, label: str, text: str, style: str) -> None:
        self._end()
        self._label(label)
        self._console.print(Styled(_indented(text), style), soft_wrap=True)
        self._at_start = True

    def _label(self, label: str) -> None:
        self._console.print(Styled(f"{label:<{LABEL_WIDTH}}", "dim"), end="", soft_wrap=True)
        self._at_start = False

    def _end(self) -> None:
        """Close the line that is open."""
        if not self._at_start:
            self._console.print()
        self._block, self._at_start = None, True


def describe(stats: Stats) -> str:
    """Return the counts as one line."""
    parts = [
        _count(stats.searches, "search", "searches"),
        _count(stats.turns, "turn", "turns"),
        f"{stats.policy_tokens} tokens written, {stats.read_tokens} read",
        f"{stats.seconds:.1f} s",
        f"{stats.tokens_per_second:.0f} tokens/s",
    ]
    if stats.tool_failures:
        parts.insert(1, _count(stats.tool_failures, "failed call", "failed calls"))
    return " · ".join(parts)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


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
                self._say("that line is not text in UTF-8", "yellow")
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
