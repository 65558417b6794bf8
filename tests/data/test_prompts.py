from __future__ import annotations

import pytest

from searchr1.agent.protocol import parse_action
from searchr1.data.prompts import fill_template, render_prompt, wants_passages
from searchr1.data.templates import SEARCHR1, TEMPLATES
from searchr1.errors import UserError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]


def test_a_plain_prompt_is_taken_as_it_stands(tokenizer):
    assert render_prompt("  Who?\n", None, tokenizer, None, False) == "  Who?\n"
    assert render_prompt("Who?", "another question", tokenizer, "none", False) == "Who?"


def test_a_plain_prompt_becomes_a_user_message_if_asked(tokenizer):
    assert render_prompt("Who?", None, tokenizer, None, True) == "<user>Who?</user><assistant>"


def test_chat_messages_go_through_the_chat_template(tokenizer):
    expected = "<system>Be brief.</system><user>Who?</user><assistant>"
    assert render_prompt(CHAT, None, tokenizer, None, False) == expected
    assert render_prompt(CHAT, None, tokenizer, "searchr1", False) == expected


def test_templates_take_the_question(tokenizer):
    assert render_prompt(None, "Who {x}? ", tokenizer, "demo", False) == "Question: Who {x}?\n"
    assert render_prompt("Who?", None, tokenizer, "demo", False) == "Question: Who?\n"
    assert (
        render_prompt("made by someone else", "Who?", tokenizer, "demo", True) == "<user>Question: Who?\n</user><assistant>"
    )


def test_the_searchr1_template_reports_the_protocol(tokenizer):
    text = render_prompt(None, "Who?", tokenizer, "searchr1", False)
    assert text.endswith("Question: Who?\n")
    for tag in ("think", "search", "information", "answer"):
        assert f"<{tag}>" in text
        assert f"</{tag}>" in text
    assert "Beijing" in text
    assert parse_action("<answer> Beijing </answer>").kind == "answer"
    assert SEARCHR1.count("{") == 1


ASKING = [name for name, text in TEMPLATES.items() if text is not None and name != "demo"]


@pytest.mark.parametrize("name", ASKING)
def test_every_template_asks_for_the_answer_where_the_reward_reads_it(tokenizer, name):
    passages = "Doc 1" if wants_passages(name) else None
    text = render_prompt(None, "Who?", tokenizer, name, False, passages)
    assert text.endswith("Question: Who?\n")
    assert "between <answer> and </answer>" in text
    assert ("<search>" in text) == (name in ("searchr1", "asearcher"))
    assert ("<access> url </access>" in text) == (name == "asearcher")
    assert ("<think>" in text) == (name != "direct")


def test_rag_shows_the_passages_and_puts_nothing_into_them(tokenizer):
    text = render_prompt(None, "Who wrote {passages}?", tokenizer, "rag", False, "Doc 1 {question}")
    assert text.index("Doc 1 {question}\n") < text.index("Question: Who wrote {passages}?\n")
    chat = render_prompt(None, "Who?", tokenizer, "rag", True, "Doc 1")
    assert chat.startswith("<user>")
    assert "Doc 1" in chat


@pytest.mark.parametrize(
    ("template", "passages", "message"),
    [("rag", None, "none came"), ("cot", "Doc 1", "shows no passages"), (None, "Doc 1", "prompt_template to rag")],
)
def test_passages_belong_to_rag_and_to_no_other(tokenizer, template, passages, message):
    with pytest.raises(UserError, match=message):
        render_prompt("Who?", None, tokenizer, template, False, passages)


def test_a_template_of_the_user(tmp_path, tokenizer):
    own = tmp_path / "own.txt"
    own.write_text("Frage: {question} <answer>", encoding="utf-8")
    assert render_prompt(None, "Wer?", tokenizer, str(own), False) == "Frage: Wer? <answer>"
    (tmp_path / "no.txt").write_text("Frage", encoding="utf-8")
    for name in ("no.txt", "gone.txt"):
        with pytest.raises(UserError, match=name):
            fill_template(str(tmp_path / name), "Wer?")


@pytest.mark.parametrize(
    ("prompt", "question", "template", "message"),
    [
        (None, None, None, "data.prompt_key"),
        (None, "Who?", None, "data.prompt_template"),
        (None, "Who?", "none", "data.prompt_template"),
        (None, "  ", "demo", "question is empty"),
        ("", None, "demo", "question is empty"),
        (" \n", None, None, "prompt is empty"),
        ([], None, None, "chat messages"),
        ([{"role": "user"}], None, None, "chat messages"),
        ([{"role": "user", "content": " "}], None, None, "prompt is empty"),
        ([{"role": "tool", "content": "x"}], None, None, "no tools here"),
        (["Who?"], None, None, "chat messages"),
        (7, None, None, "int"),
        ("Who?", None, "serachr1", "searchr1, asearcher"),
    ],
)
def test_what_cannot_become_a_prompt_is_reported(tokenizer, prompt, question, template, message):
    with pytest.raises(UserError, match=message):
        render_prompt(prompt, question, tokenizer, template, False)


def test_chat_messages_are_their_text_where_the_tokenizer_has_no_chat_template(bare_tokenizer):
    assert render_prompt(CHAT, None, bare_tokenizer, None, False) == "Be brief.\n\nWho?"
    assert render_prompt(CHAT[1:], None, bare_tokenizer, None, False) == "Who?"
    with pytest.raises(UserError, match=r"data\.apply_chat_template: .* no chat template"):
        render_prompt("Who?", None, bare_tokenizer, None, True)


def test_parts_are_one_text_and_a_template_that_leaves_the_question_out_is_rejected(tokenizer, bare_tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]}]
    assert render_prompt(parts, None, tokenizer, None, False) == "<user>Who is it?</user><assistant>"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(UserError, match="image_url"):
        render_prompt(image, None, tokenizer, None, False)
    bare_tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{% endfor %}"
    with pytest.raises(UserError, match=r"leaves out .* the user's 'Who\?'"):
        render_prompt(CHAT, None, bare_tokenizer, None, False)


def test_a_template_takes_the_question_out_of_a_rendered_prompt(tokenizer):
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(rendered, None, tokenizer, "demo", False) == "Question: Who?\n"
    assert render_prompt(rendered, None, tokenizer, None, False) == rendered
