"""A question's events, with a scripted engine beside the real loop, tools and prompts."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from support.scripted_chat import ADA, ANSWER, SEARCH, CharTokenizer, ScriptedEngine, ScriptedSearch, make_chat

from searchr1.agent.loop import run_trajectory
from searchr1.agent.settings import GenerateParams
from searchr1.agent.trajectory import Sample
from searchr1.chat.events import Done, Failed, InvalidAction, Read, Started, Text, ToolCalled, ToolFailed, ToolReturned
from searchr1.rollout.engine import EngineError

INFORMATION = '\n\n<information>Doc 1(Title: "Ada Lovelace") Ada wrote the first program.</information>\n\n'


def ask(chat, question="q"):
    async def collect():
        async with asyncio.timeout(20), aclosing(chat.ask(question)) as events:
            return [event async for event in events]

    return asyncio.run(collect())


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def written(events):
    found = {}
    for event in of(Text, events):
        found[event.block] = found.get(event.block, "") + event.text
    return found


def test_everything_that_happens_is_an_event_in_order():
    events = ask(make_chat({"q": [SEARCH, ANSWER]}))
    order = [event.type for event in events]
    merged = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert merged == ["started", "turn", "text", "call", "found", "read", "turn", "text", "done"]
    assert len(of(Text, events)) > 8  # it streams
    assert written(events) == {"think": "Who was it?Found it.", "search": "first program", "answer": "Ada Lovelace"}
    assert of(ToolCalled, events)[0].arguments == ["first program"]
    passage = of(ToolReturned, events)[0].results[0][0]
    assert (passage.title, passage.text, passage.url, passage.score) == (ADA.title, ADA.text, ADA.url, ADA.score)
    assert of(Read, events)[0].text == INFORMATION
    done = events[-1]
    assert (done.answer, done.stop, done.note) == ("Ada Lovelace", "answer", None)
    assert (done.stats.searches, done.stats.turns, done.stats.prompt_tokens) == (1, 2, len("Question: q\n"))
    assert (done.stats.policy_tokens, done.stats.read_tokens) == (len(SEARCH + ANSWER), len(INFORMATION))


def test_the_trajectory_is_token_for_token_the_one_of_training():
    engine = ScriptedEngine({"q": [SEARCH, "nothing", ANSWER]})
    chat = make_chat(None, engine=engine)
    watched = ask(chat)[-1].trajectory

    class Plain:
        async def generate(self, prompt_ids, params):
            return await engine.generate(prompt_ids, params, on_text=lambda text: None)

    seen_watched, engine.asked = engine.asked, []
    plain = asyncio.run(
        run_trajectory(
            sample=Sample("question/0", 0, watched.sample.prompt_ids, "q", []),
            rollout_id=0,
            engine=Plain(),
            tools=chat._tools,
            tokenizer=CharTokenizer(),
            settings=chat._settings,
            seed=0,
        )
    )
    assert engine.asked == seen_watched
    assert watched.response_ids.tolist() == plain.response_ids.tolist()
    assert watched.loss_mask.tolist() == plain.loss_mask.tolist()


def test_an_invalid_action_shows_the_message_to_the_model():
    events = ask(make_chat({"q": ["no tag at all", ANSWER]}))
    assert of(InvalidAction, events)[0].text == "\nThat was no action.\n"
    assert written(events)["text"] == "no tag at all"
    assert events[-1].stats.invalid_actions == 1


def test_a_search_that_fails_is_reported_and_the_model_goes_on():
    events = ask(make_chat({"q": [SEARCH, ANSWER]}, ScriptedSearch(error="http://x: no answer")))
    assert of(ToolFailed, events)[0].message == "http://x: no answer"
    assert events[-1].answer == "Ada Lovelace"
    assert events[-1].stats.tool_failures == 1


def test_failures_never_end_a_chat():
    chat = make_chat({"q": [SEARCH, ANSWER]}, ScriptedSearch(error="down"))
    assert all(ask(chat)[-1].answer == "Ada Lovelace" for _ in range(30))


def test_a_search_that_hangs_is_reported():
    events = ask(make_chat({"q": [SEARCH, ANSWER]}, ScriptedSearch(ADA, delay=30), tool_timeout_s=0.05))
    assert of(ToolFailed, events)[0].message.startswith("no answer within")
    assert events[-1].answer == "Ada Lovelace"


@pytest.mark.parametrize(
    ("changes", "stop", "note"),
    [
        ({"max_turns": 1}, "turns", "all 1 turns with search are used, and the model did not answer"),
        ({"max_turns": 1, "force_final_turn": False}, "turns", "all 1 turns with search are used (agentloop"),
        ({"max_model_len": 100}, "length", "prompt and answer may have 100 tokens"),
        ({"sampling": GenerateParams(max_new_tokens=70)}, "length", "the answer may have 70 tokens"),
    ],
)
def test_the_limit_that_ends_an_answer_is_named(changes, stop, note):
    done = ask(make_chat({"q": [SEARCH, SEARCH + " again"]}, **changes))[-1]
    assert (done.answer, done.stop) == (None, stop)
    assert done.note.startswith(note)


def test_the_end_of_a_text_without_an_answer():
    done = ask(make_chat({"q": ["I do not know" + chr(0)]}))[-1]
    assert done.stop == "eos"
    assert done.note.startswith("the model ended its text without an answer; it wrote no <search> or <answer> tag at all")


@pytest.mark.parametrize(
    ("question", "message"), [("x" * 2000, "the question is too long: 2011 tokens"), (" ", "empty"), ("\ud800", "surrogate")]
)
def test_questions_that_cannot_be_asked(question, message):
    events = ask(make_chat({}), question)
    assert [type(event) for event in events] == [Failed]
    assert message in events[0].message


@pytest.mark.parametrize("error", [EngineError("the rollout engine stopped: out of memory"), ValueError("broken")])
def test_an_engine_that_fails_is_reported_and_the_chat_goes_on(error):
    engine = ScriptedEngine({"q": [ANSWER]})
    chat = make_chat(None, engine=engine)
    engine.error = error
    events = ask(chat)
    assert isinstance(events[0], Started)
    assert str(error) in events[-1].message
    engine.error = None
    assert isinstance(ask(chat)[-1], Done)


def test_leaving_early_aborts_the_generation():
    engine = ScriptedEngine({"q": ["<think> " + "on and on " * 1000]}, delay=0.001)

    async def scene():
        async with aclosing(make_chat(None, engine=engine).ask("q")) as events:
            async for event in events:
                if isinstance(event, Text):
                    break
        assert (engine.running, engine.aborted) == (0, 1)

    asyncio.run(scene())


def test_several_questions_run_at_once():
    engine = ScriptedEngine({str(i): [SEARCH, f"<answer> {i} </answer>"] for i in range(20)}, delay=0.001)
    chat = make_chat(None, engine=engine)

    async def one(question):
        async with aclosing(chat.ask(question)) as events:
            return [event async for event in events][-1].answer

    async def scene():
        return await asyncio.gather(*(one(str(i)) for i in range(20)))

    assert asyncio.run(scene()) == [str(i) for i in range(20)]
    assert engine.most > 5


def test_a_template_with_passages_searches_first():
    backend = ScriptedSearch(ADA)
    engine = ScriptedEngine({"q": [ANSWER]})
    chat = make_chat(None, backend, engine=engine, template="rag")
    assert ask(chat)[-1].answer == "Ada Lovelace"
    assert backend.queries == [["q"]]
    assert 'Doc 1(Title: "Ada Lovelace")' in "".join(map(chr, engine.asked[0]))
    ask(make_chat(None, backend, engine=engine, template="rag", max_tool_response_length=12))
    assert "Doc 1(Title:" in "".join(map(chr, engine.asked[1]))
    assert "Lovelace" not in "".join(map(chr, engine.asked[1]))
    backend.error = "down"
    assert "the search failed: down" in ask(chat)[-1].message


def test_without_a_template_the_question_is_the_prompt():
    engine = ScriptedEngine({"q": [ANSWER]})
    ask(make_chat(None, engine=engine, template="none"), " Question: q\n")
    assert "".join(map(chr, engine.asked[0])) == "Question: q"


def test_pages_are_opened_by_the_model_too():
    backend = ScriptedSearch(pages={"https://w.example/Ada": "The whole page."})
    events = ask(make_chat({"q": ["<access> https://w.example/Ada </access>", ANSWER]}, backend))
    found = of(ToolReturned, events)[0]
    assert (found.action, found.results[0][0].text, found.results[0][0].url) == (
        "access",
        "The whole page.",
        "https://w.example/Ada",
    )
    assert ">>>> Page 1 >>>>" in of(Read, events)[0].text
