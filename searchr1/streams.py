"""Standard streams that take every text: whatever the terminal's encoding, closed, or a pipe that nobody reads any more."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys

HANDLER = "searchr1.readable"
"""The error handler of standard output and standard error."""
EXIT_BROKEN_PIPE = 141
"""What a shell reports of a program that SIGPIPE ended."""
_ASCII = {
    "→": "->", "←": "<-", "↑": "^", "↓": "v", "…": "...", "×": "x", "±": "+-", "−": "-", "–": "-", "—": "-", "·": "-",
    "•": "*", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "‹": "<", "›": ">", "«": "<<", "»": ">>", "“": '"', "”": '"',
    "„": '"', "‘": "'", "’": "'", "✓": "yes", "✗": "no", "\u00a0": " ", "\u202f": " ", "█": "#", "░": ".",
}  # fmt: skip
_ASCII |= dict.fromkeys("─━═╌┄╴╶╸╺╼╾", "-") | dict.fromkeys("│┃║╎┆╵╷╹╻", "|")
_ASCII |= dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯┏┓┗┛┣┫┳┻╋┡┩╇╈╔╗╚╝╠╣╦╩╬┠┨┯┷┿", "+")
"""What this program and its tables write, for encodings that lack it; any other character becomes a backslash escape."""


def _readable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(char) or char.encode("ascii", "backslashreplace").decode() for char in text), error.end


codecs.register_error(HANDLER, _readable)


def open_streams(for_children: bool = False) -> None:
    """Make standard output and error write what their encoding lacks in ASCII, and give closed streams the null device.

    Args:
        for_children: make the Python processes that this one starts do the like.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, _null_stream(number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)
    if for_children:
        os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:backslashreplace"


def leave_ascii() -> None:
    """Start this program again in Python's UTF-8 mode where its file names can only be ASCII: a C locale with that mode off.

    Names that are not ASCII would reach libraries as halves of surrogate pairs. What is written stays ASCII.
    """
    if sys.getfilesystemencoding() == "ascii" and sys.executable:
        encoding = os.environ.get("PYTHONIOENCODING") or "ascii:backslashreplace"
        again = {"PYTHONUTF8": "1", "PYTHONIOENCODING": encoding}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | again)


def _null_stream(number: int) -> io.TextIOWrapper:
    """Return a stream without content at a descriptor that was closed: the next file opened would get its number, and other
    libraries would write into it."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number, inheritable=True)
            os.close(opened)
        else:
            os.set_inheritable(number, True)
    return open(number, "w" if number else "r", encoding="utf-8", closefd=False)


def output_is_broken() -> bool:
    """Return whether standard output or standard error is a pipe that nobody reads any more."""
    watch = select.poll()
    for number in (1, 2):
        watch.register(number, 0)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def drop_output() -> None:
    """Send what was not written to the null device, so that the interpreter does not try it again as it ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(null, number)
    os.close(null)
