"""`Chat`, the class for Python, with a scripted engine beside the real loop, tools and prompts."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.chat_flags import MODEL
from support.scripted_chat import ADA, ANSWER, SEARCH, ScriptedEngine, ScriptedSearch, make_chat

from searchr1.chat.session import Chat, ChatError
from searchr1.errors import UserError
from searchr1.rollout.engine import EngineError


class ClosingEngine(ScriptedEngine):
    closed = 0

    async def close(self):
        self.closed += 1


def opened(chat):
    async def open_chat():
        return chat

    return open_chat


def test_an_answer_holds_its_text_queries_passages_and_tokens():
    backend = ScriptedSearch(ADA)
    engine = ClosingEngine({"q": [SEARCH, ANSWER]})
    with Chat(opened(make_chat(None, backend, engine=engine))) as chat:
        answer = chat.ask("q")
        assert (answer.question, answer.text, answer.stop, answer.note) == ("q", "Ada Lovelace", "answer", None)
        assert answer.queries == ["first program"]
        assert [passage.title for passage in answer.passages] == ["Ada Lovelace"]
        assert answer.stats.searches == 1
        assert answer.trajectory.policy_length == len(SEARCH + ANSWER)
        assert answer.events[-1].type == "done"
        assert chat.about["model"] == "scripted"
    assert backend.closed
    assert engine.closed == 1
    with pytest.raises(ChatError, match="closed"):
        chat.ask("q")
    chat.close()
    assert engine.closed == 1


def test_a_missing_answer_has_a_reason_and_is_no_error():
    with Chat(opened(make_chat({"q": [SEARCH, SEARCH + " again"]}, max_turns=1))) as chat:
        answer = chat.ask("q")
    assert answer.text is None
    assert answer.note.startswith("all 1 turns with search are used")


def test_questions_and_engines_that_fail_raise_and_the_chat_goes_on():
    engine = ScriptedEngine({"q": [ANSWER]})
    with Chat(opened(make_chat(None, engine=engine))) as chat:
        with pytest.raises(ChatError, match="too long"):
            chat.ask("x" * 2000)
        engine.error = EngineError("out of memory")
        with pytest.raises(ChatError, match="out of memory"):
            chat.ask("q")
        engine.error = None
        assert chat.ask("q").text == "Ada Lovelace"


def test_leaving_a_stream_aborts_its_generation_before_it_returns():
    engine = ScriptedEngine({"q": ["<think> " + "on and on " * 5000]}, delay=0.001)
    with Chat(opened(make_chat(None, engine=engine))) as chat:
        stream = chat.stream("q")
        while next(stream).type != "text":
            pass
        stream.close()
        assert (engine.running, engine.aborted) == (0, 1)


def test_several_threads_ask_at_once():
    engine = ScriptedEngine({str(i): [SEARCH, f"<answer> {i} </answer>"] for i in range(8)}, delay=0.002)
    with Chat(opened(make_chat(None, engine=engine))) as chat, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(chat.ask, map(str, range(8))))
    assert [answer.text for answer in answers] == [str(i) for i in range(8)]
    assert engine.most > 2


def test_it_works_within_a_running_event_loop():
    async def scene():
        with Chat(opened(make_chat({"q": [ANSWER]}))) as chat:
            return chat.ask("q").text

    assert asyncio.run(scene()) == "Ada Lovelace"


def test_a_chat_that_does_not_open_leaves_no_thread():
    async def broken():
        raise UserError("--model_path /nowhere: no such folder")

    before = threading.active_count()
    with pytest.raises(UserError, match="no such folder"):
        Chat(broken)
    assert threading.active_count() == before


def test_load_passes_its_options_on(monkeypatch):
    plans = []

    async def open_chat(plan):
        plans.append(plan)
        return make_chat({"q": [ANSWER]})

    monkeypatch.setattr("searchr1.chat.session.open_chat", open_chat)
    with Chat.load(MODEL, retriever_url="127.0.0.1:9", topk=7, max_turns=1, overrides=["runner.seq_length=600"]) as chat:
        assert chat.ask("q").text == "Ada Lovelace"
    (plan,) = plans
    assert plan.config.rollout.model.model_path == MODEL
    assert (plan.config.tools.search.server_addr, plan.config.tools.search.topk) == (["127.0.0.1:9"], 7)
    assert (plan.config.agentloop.max_turns, plan.config.runner.seq_length) == (1, 600)
    with pytest.raises(UserError, match="--topk 0"):
        Chat.load(MODEL, topk=0)
    with pytest.raises(UserError, match="give one of them"):
        Chat.load(MODEL, retriever_url="127.0.0.1:9", search=False)
