"""What the flags of infer, chat and serve-chat make of a run's configuration, and what infer prints."""

from __future__ import annotations

import asyncio
import io
import json

import pytest
from support.chat_flags import MODEL, planned
from support.scripted_chat import ADA, ANSWER, SEARCH, ScriptedEngine, ScriptedSearch, make_chat

from searchr1.agent.settings import AgentSettings
from searchr1.chat.infer import read_questions, run
from searchr1.chat.load import build_tools, fit_to_model, open_search_backend, prompt_settings
from searchr1.chat.plan import RECIPE
from searchr1.chat.search_backends import check_servers
from searchr1.chat.terminal import printable
from searchr1.commands.flags import parser, plan_of
from searchr1.commands.infer import main
from searchr1.config.load import load_config, save_config
from searchr1.errors import UserError

HEADLINE = "examples/searchr1/config/qwen2.5-3b-tool-1node.yaml"


def test_without_a_run_the_headline_recipe_counts():
    chosen, recipe = planned().config, load_config(HEADLINE)
    ours, theirs = AgentSettings.from_config(chosen, "eval"), AgentSettings.from_config(recipe, "eval")
    assert set(ours.sampling.stop) == {*theirs.sampling.stop, "</access>"}
    for name in AgentSettings.__slots__:
        if name != "sampling":
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.sampling.max_new_tokens == theirs.sampling.max_new_tokens == 3000
    assert ours.sampling.temperature == 0
    assert (chosen.tools.search.topk, chosen.data.max_prompt_length) == (3, 4096)


def test_a_run_gives_its_own_limits_template_and_stop_strings(tmp_path):
    config = load_config(RECIPE, ["agentloop.max_turns=7", "algorithm.sampling_params.stop=[END]", "runner.seq_length=999"])
    config.data.prompt_template, config.data.max_prompt_length = "demo", 77
    config.rollout.model.precision = "fp16"
    save_config(config, tmp_path / "config.yaml")
    chosen = planned("--config", str(tmp_path / "config.yaml"))
    settings = AgentSettings.from_config(chosen.config, "eval")
    assert (settings.max_turns, settings.sampling.stop, settings.max_model_len) == (7, ("END",), 999)
    assert chosen.config.rollout.model.model_path == MODEL
    assert (chosen.auto_chat, chosen.auto_precision, chosen.auto_length) == (False, False, False)
    prompt = prompt_settings(chosen, type("T", (), {"chat_template": "x"}))
    assert (prompt.template, prompt.chat, prompt.max_tokens) == ("demo", False, 77)


def test_a_run_of_whole_prompts_takes_the_known_template_and_reports_it(tmp_path, capsys):
    config = load_config(RECIPE)
    config.data.prompt_template = None
    save_config(config, tmp_path / "config.yaml")
    chosen = planned("--config", str(tmp_path / "config.yaml"))
    assert chosen.config.data.prompt_template == "searchr1"
    assert "names no data.prompt_template" in capsys.readouterr().err
    assert prompt_settings(chosen, type("T", (), {"chat_template": "x"})).chat
    assert not prompt_settings(chosen, type("T", (), {"chat_template": None})).chat


def test_flags_and_overrides_go_on_top():
    chosen = planned(
        "--max_turns", "0", "--topk", "9", "--temperature", "0.7", "--access", "agentloop.information_style=rlinf"
    )
    settings = AgentSettings.from_config(chosen.config, "eval")
    assert (settings.max_turns, settings.information_style, settings.sampling.temperature) == (0, "rlinf", 0.7)
    assert chosen.config.tools.search.topk == 9
    assert set(build_tools(chosen.config, ScriptedSearch())) == {"search", "access"}
    assert planned("--no-search").config.tools.search.dummy_mode
    assert planned("--retriever-url", "a:1", "--retriever-url", "b:2").config.tools.search.server_addr == ["a:1", "b:2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model_path", "/no/such/model"], "/no/such/model: no such folder"),
        (["--model_path", "examples"], "examples: has no config.json"),
        (["--no-search", "--engine", "serper"], "give one of them"),
        (["--snippet_only"], "need --engine"),
        (["--topk", "0"], "--topk 0"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--prompt_template", "nonsense"], "'nonsense' is not known"),
        (["--config", "none.yaml"], "none.yaml: no such file"),
        (["agentloop.max_turn=3"], "did you mean agentloop.max_turns"),
        (["agentloop.information_style=x"], "agentloop.information_style: 'x' is not one of"),
        (["agentloop.toolcall_parser=hermes"], "agentloop.toolcall_parser: 'hermes' is not one of"),
        (["--access", "agentloop.toolcall_parser=searchr1"], "agentloop.toolcall_parser: searchr1 reads no <access>"),
    ],
)
def test_mistakes_are_reported(argv, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        planned(*argv)


def test_a_checkpoint_that_was_not_converted_is_recognised(tmp_path):
    (tmp_path / "actor").mkdir()
    with pytest.raises(UserError, match="convert it first"):
        planned("--model_path", str(tmp_path))
    with pytest.raises(UserError, match="--model_path: is missing"):
        plan_of(parser("infer", "").parse_args([]))


def test_lengths_are_cut_to_the_model_unless_they_were_asked_for():
    chosen = planned()
    fit_to_model(chosen.config, chosen.auto_length)
    assert (chosen.config.runner.seq_length, chosen.config.data.max_prompt_length) == (1024, 512)
    asked = planned("--seq_length", "5000")
    with pytest.raises(UserError, match="has 1024 positions; give --seq_length 1024"):
        fit_to_model(asked.config, asked.auto_length)


def test_a_retriever_that_does_not_answer_is_reported_at_the_start(monkeypatch):
    monkeypatch.setattr("searchr1.chat.search_backends.HEALTH_SECONDS", 0.1)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    chosen = planned("--retriever-url", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9: .*--no-search"):
        asyncio.run(open_search_backend(chosen))
    assert asyncio.run(check_servers(chosen.config.tools.search)) is not None
    assert asyncio.run(open_search_backend(planned("--no-search"))) is None

    class Person(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Person("y\n"))
    monkeypatch.setattr("sys.stderr", Person())
    assert asyncio.run(open_search_backend(chosen)) is None
    assert chosen.config.tools.search.dummy_mode


def test_an_online_engine_wants_its_key(monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(UserError, match="SERPER_API_KEY"):
        asyncio.run(open_search_backend(planned("--engine", "serper")))
    with pytest.raises(UserError, match="--engine bong: is not known; use one of serper"):
        asyncio.run(open_search_backend(planned("--engine", "bong")))


def test_questions_come_from_flags_input_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n two \n"))
    (tmp_path / "q.txt").write_text("three\n\n")
    (tmp_path / "q.jsonl").write_text('{"question": "four"}\n{"question": "fi\u2028ve"}\r\n', encoding="utf-8")
    assert read_questions(["zero", "-"], tmp_path / "q.txt") == ["zero", "one", "two", "three"]
    assert read_questions([], tmp_path / "q.jsonl") == ["four", "fi\u2028ve"]
    (tmp_path / "q.csv").write_text("question;answer\nsix;x\n")
    assert read_questions([], tmp_path / "q.csv") == ["six"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="--prompt -: the input is not text"):
        read_questions(["-"], None)
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n{"q": 1}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        read_questions([], tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="no question"):
        main(["--model_path", MODEL])


SCRIPT = {"q": [SEARCH, ANSWER], "dumb": ["no"]}


def test_infer_prints_the_way_and_the_answer(capsys):
    assert asyncio.run(run(make_chat(SCRIPT), ["q"], as_rows=False, full=False))
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0] == "think    Who was it?"
    assert lines[1] == "search   first program"
    assert "1. Ada Lovelace  https://w.example/Ada" in lines
    assert lines[-1] == "Answer: Ada Lovelace"
    assert "\x1b" not in out


def test_several_questions_become_rows_in_their_order(capsys):
    assert asyncio.run(run(make_chat(SCRIPT, max_turns=1), ["dumb", "q", "x" * 2000], as_rows=True, full=False)) is False
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["answer"] for row in rows] == [None, "Ada Lovelace", None]
    assert rows[0]["note"].startswith("all 1 turns")
    assert rows[1]["turns"][0]["queries"] == ["first program"]
    assert rows[1]["turns"][0]["policy_text"] == SEARCH
    assert "too long" in rows[2]["error"]


def test_many_questions_take_turns(capsys):
    engine = ScriptedEngine({f"{i}": [ANSWER] for i in range(12)}, delay=0.001)
    chat = make_chat(None, engine=engine)
    assert asyncio.run(run(chat, [str(i) for i in range(12)], as_rows=True, full=False, at_once=3))
    assert engine.most == 3
    assert [json.loads(line)["question"] for line in capsys.readouterr().out.splitlines()] == [str(i) for i in range(12)]


def test_overrides_may_stand_anywhere(monkeypatch):
    seen = []
    monkeypatch.setattr("searchr1.commands.infer.load_and_run", lambda chosen, questions, **_: seen.append(chosen))
    monkeypatch.setattr("asyncio.run", lambda _: True)
    assert main(["agentloop.max_turns=7", "--model_path", MODEL, "tools.search.topk=9", "--prompt", "q"]) == 0
    assert (seen[0].config.agentloop.max_turns, seen[0].config.tools.search.topk) == (7, 9)


def test_a_question_typed_in_a_locale_without_utf8_is_read():
    kept = "Où est 東京?".encode().decode("ascii", "surrogateescape")
    assert read_questions([kept], None) == ["Où est 東京?"]
    assert read_questions(["half \ud83d"], None) == ["half \ud83d"]  # refused as a question, not here


def test_what_models_and_pages_write_cannot_steer_a_terminal(capsys):
    evil = "\x1b]0;title\x07\x1b[2J[red]x[/red]\r\u202e\x9b31m"
    document = type(ADA)("1", evil, evil, evil)
    chat = make_chat(
        {"q": [f"<think>{evil}</think><search> q </search>", f"<answer>{evil}</answer>"]}, ScriptedSearch(document)
    )
    asyncio.run(run(chat, ["q"], as_rows=False, full=True))
    asyncio.run(run(chat, ["q"], as_rows=False, full=False))
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\r", "\u202e", "\x9b"} & set(out)
    assert "[red]x[/red]" in out
    assert printable("a\tb\r\nc\ud800") == "a\tb\nc\ufffd"
