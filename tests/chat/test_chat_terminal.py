"""The chat in the terminal, with prepared input lines."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from rich.console import Console
from support.scripted_chat import ANSWER, SEARCH, ScriptedEngine, make_chat

from searchr1.chat.session import Chat
from searchr1.chat.terminal import Conversation


def converse(monkeypatch, capsys, chat, *lines):
    """What is printed for these lines; an exception class is raised by the prompt."""
    waiting = [*lines, EOFError]

    def read(prompt=""):
        line = waiting.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)

    async def opened():
        return chat

    with Chat(opened) as open_chat:
        Conversation(open_chat, Console(highlight=False, markup=False, emoji=False, width=200)).loop()
    assert waiting == [] or "/quit" in lines
    return capsys.readouterr().out


def test_questions_and_commands(monkeypatch, capsys):
    chat = make_chat({"q": [SEARCH, ANSWER], "/etc is what?": [ANSWER]})
    out = converse(
        monkeypatch, capsys, chat, "q", "", "/model", "/full", "q", "/etc is what?", "/history", "/wrong", "/help"
    )
    assert out.count("answer   Ada Lovelace") == 3
    assert "1. Ada Lovelace  https://w.example/Ada" in out
    assert 'read     <information>Doc 1(Title: "Ada Lovelace")' in out
    assert "model        scripted" in out
    assert "q\nq\n/etc is what?" in out
    assert "no command /wrong" in out
    assert "/history" in out


def test_quit_ends_at_once_and_ctrl_c_at_the_prompt_does_not(monkeypatch, capsys):
    chat = make_chat({"q": [ANSWER]})
    assert "Ada" in converse(monkeypatch, capsys, chat, KeyboardInterrupt, "q")
    assert converse(monkeypatch, capsys, chat, "/quit", "q") == ""


@pytest.mark.timeout(60)
def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch, capsys):
    class Interrupted(ScriptedEngine):
        async def generate(self, prompt_ids, params, timeout_s=None, on_text=None):
            if "long" in "".join(map(chr, prompt_ids)):
                asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGINT)
            return await super().generate(prompt_ids, params, timeout_s, on_text)

    engine = Interrupted({"long": ["<think> " + "on and on " * 5000], "q": [ANSWER]}, delay=0.001)
    # Whoever runs the tests in the background may have had SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        out = converse(monkeypatch, capsys, make_chat(None, engine=engine), "long", "q")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (engine.aborted, engine.running) == (1, 0)
    assert "stopped" in out
    assert out.index("stopped") < out.index("answer   Ada Lovelace")
