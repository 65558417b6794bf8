"""Halves of surrogate pairs, wherever text comes in that is not a file of rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.agent.protocol import Document, neutralise, render_body
from searchr1.agent.tools import show_page
from searchr1.demo.cold_start_rows import train_tokenizer
from searchr1.files.text_rows import whole_text


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("plain", "plain"),
        ("é 東 😀", "é 東 😀"),
        ("a\ud83d", "a\ufffd"),
        ("\ude00b", "\ufffdb"),
        ("\ud83dA\udc00", "\ufffdA\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("", ""),
    ],
)
def test_only_halves_are_replaced(text, whole):
    assert whole_text(text) == whole


def test_retrieved_text_can_be_tokenized():
    bad, tokenizer = "half \ud83d", train_tokenizer()
    texts = [neutralise(bad), show_page(bad)]
    texts += [render_body([[Document(bad, bad, url=bad, contents=bad)]], style) for style in ("searchr1", "rlinf")]
    for text in texts:
        assert "half \ufffd" in text
        assert tokenizer.encode(text)


@given(st.text(st.characters()))
def test_what_comes_out_is_utf8_and_what_was_stays(text):
    whole = whole_text(text)
    assert whole.encode().decode() == whole
    assert whole_text(whole) == whole
    if not any("\ud800" <= char <= "\udfff" for char in text):
        assert whole == text
