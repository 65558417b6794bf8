"""Cutting what the policy writes at its tags, whatever the pieces in which it comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.agent.loop import END_TOKENS
from searchr1.agent.protocol import TAGS
from searchr1.chat.events import Blocks, open_at_end

MARKS = [*(f"<{tag}>" for tag in TAGS), *(f"</{tag}>" for tag in TAGS), *END_TOKENS]


def cut(*pieces, kind="text"):
    """Neighbouring pieces of one block joined; a new block of the same kind stays apart only if its kind changed between."""
    blocks = Blocks(kind)
    found = [part for piece in pieces for part in blocks.feed(piece)] + blocks.finish()
    joined = []
    for block, text in found:
        if joined and joined[-1][0] == block:
            joined[-1][1] += text
        else:
            joined.append([block, text])
    return [tuple(part) for part in joined]


def test_a_turn_becomes_its_blocks():
    text = "<think> Who was it?\nI search.</think>\n\n<search> Ada </search>"
    assert cut(text) == [("think", "Who was it?\nI search."), ("search", "Ada")]
    assert cut("<answer> Paris </answer><|im_end|>") == [("answer", "Paris")]
    assert cut("so <information>made up</information> there") == [
        ("text", "so"),
        ("information", "made up"),
        ("text", "there"),
    ]


def test_an_action_inside_unclosed_thoughts_is_an_action():
    assert cut("<think> I wonder <search> Ada</search>") == [("think", "I wonder"), ("search", "Ada")]


def test_a_turn_that_begins_inside_thoughts():
    assert open_at_end("\n</information>\n<think>\n") == "think"
    assert open_at_end("</information>\n\n") == "text"
    assert open_at_end("example <answer> Beijing </answer>") == "text"
    assert cut("so</think><answer> A </answer>", kind="think") == [("think", "so"), ("answer", "A")]


@pytest.mark.parametrize("text", ["a < b", "x <3 y", "<thin", "</", "a<b>c</b>", "<THINK>x</THINK>", "< think >"])
def test_what_is_no_tag_stays_text(text):
    assert cut(*text) == [("text", text)]


def test_a_tag_that_may_still_come_is_held_back_and_nothing_else():
    blocks = Blocks()
    assert blocks.feed("one <sea") == [("text", "one")]
    assert blocks.feed("son") == [("text", " <season")]
    assert blocks.feed(" <search") == []
    assert blocks.feed("> q") == [("search", "q")]


PARTS = st.one_of(st.sampled_from(MARKS), st.text(alphabet="ab <>/|\n", max_size=6), st.text(max_size=4))


@given(st.lists(PARTS, max_size=12), st.data())
def test_pieces_make_no_difference_and_no_text_is_lost(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = cut(text)
    assert cut(*pieces) == whole
    blocks = Blocks()
    single = [part for piece in pieces for _, part in blocks.feed(piece)]
    assert not any(mark in part for mark in MARKS for part in single)
    rest = text
    for mark in sorted(MARKS, key=len, reverse=True):
        rest = rest.replace(mark, " ")
    assert "".join("".join(part for _, part in whole).split()) == "".join(rest.split())
