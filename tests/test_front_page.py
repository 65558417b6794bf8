"""The Python example of README.rst: it runs, with stand-ins of the right signatures for what needs an engine."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from unittest import mock

import searchr1
from searchr1.chat.events import ToolCalled
from searchr1.chat.session import Answer, Chat
from searchr1.training.train import train

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_runs(monkeypatch, capsys):
    match = re.search(r"^\.\. code-block:: python\n\n((?: {3}.*\n|\n)+)", (ROOT / "README.rst").read_text(), re.M)
    assert match
    code = textwrap.dedent(match[1])
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    trains = mock.create_autospec(train, return_value=Path("results/run"))
    chat = mock.create_autospec(Chat, instance=True)
    chat.__enter__.return_value = chat
    events = [ToolCalled("search", ["Quosta Zomert"])]
    chat.ask.return_value = Answer("", "Ada Lovelace.", "answer", None, mock.Mock(), mock.Mock(), events)
    chats = mock.create_autospec(Chat)
    chats.load.return_value = chat
    monkeypatch.setitem(vars(searchr1), "train", trains)
    monkeypatch.setitem(vars(searchr1), "Chat", chats)
    monkeypatch.chdir(ROOT)

    exec(compile(code, "README.rst", "exec"), {})

    (config,) = trains.call_args.args
    assert (config.runner.max_steps, config.algorithm.adv_type) == (10, "rloo")
    assert chats.load.call_count == 1
    assert capsys.readouterr().out == "['Quosta Zomert']\nAda Lovelace. 1.0\n"
