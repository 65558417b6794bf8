from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from searchr1.tracking.token_text import TokenText, load_token_text

MODEL = Path(__file__).parents[2] / "examples/demo/cold_start"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def vocabulary():
    found = load_token_text(str(MODEL))
    assert found is not None
    return found


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_tokens_spell_any_text(tokenizer, vocabulary, text):
    text = text.encode("utf-8", "replace").decode()
    ids = tokenizer.encode(text, add_special_tokens=False)
    lengths = vocabulary.lengths(ids, tokenizer.decode(ids))
    assert lengths is not None
    assert len(lengths) == len(ids)
    assert sum(lengths) == len(tokenizer.decode(ids))


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 2047), max_size=12))
def test_tokens_that_are_no_valid_text_are_followed_or_given_up(tokenizer, vocabulary, ids):
    text = tokenizer.decode(ids)
    lengths = vocabulary.lengths(ids, text)
    assert lengths is None or (len(lengths) == len(ids) and sum(lengths) == len(text))


def test_each_token_has_its_characters(tokenizer, vocabulary):
    text = "<search>Zoë 谁</search>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    lengths = vocabulary.lengths(ids, text)
    assert lengths is not None
    assert lengths[0] == len("<search>")
    assert lengths[-1] == len("</search>")
    assert 0 in lengths, "the first bytes of a character that takes several tokens"


def test_a_stop_string_may_end_the_text_within_the_last_token():
    vocabulary = TokenText([b"ab", b"cde", b"f"])
    assert vocabulary.lengths([0, 1], "abc") == [2, 1]
    assert vocabulary.lengths([0, 1], "ab") is None
    assert vocabulary.lengths([0, 1], "abcdef") is None
    assert vocabulary.lengths([0, 7], "ab") is None
    assert vocabulary.lengths([], "") == []
    assert vocabulary.lengths([], "a") is None


def test_a_vocabulary_with_byte_fallback():
    words = {"<unk>": 0, "▁is": 1, "it": 2, "<0xC3>": 3, "<0xAB>": 4}
    backend = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = TokenText.of_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert vocabulary is not None
    assert vocabulary.lengths([2, 1, 3, 4], "it isë") == [2, 3, 0, 1]


def test_a_tokenizer_of_another_kind_is_reported(tmp_path, caplog):
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert load_token_text(str(tmp_path)) is None
    assert "without their tokens' log-probabilities" in caplog.text
    assert load_token_text(str(tmp_path / "nowhere")) is None
