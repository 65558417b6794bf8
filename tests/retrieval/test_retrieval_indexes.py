"""Indexes built, saved, refused; the dense path with a small random encoder."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.errors import UserError
from searchr1.retrieval import build
from searchr1.retrieval.corpus import Corpus
from searchr1.retrieval.documents import split_contents
from searchr1.retrieval.encoder import Encoder
from searchr1.retrieval.pages import canonical_url
from searchr1.retrieval.server_cli import load_index


def write_corpus(path, count=60):
    words = [f"word{i}" for i in range(count)]
    with path.open("w") as file:
        for i, word in enumerate(words):
            file.write(
                json.dumps({"id": str(i), "contents": f'"{word}"\n{word} {word} and {words[(i + 1) % count]}'}) + "\n"
            )
    return Corpus(path)


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory):
    import torch
    from transformers import BertConfig, BertModel

    from searchr1.data.demo_world.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2048, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, pad_token_id=0
    )
    BertModel(config).save_pretrained(path)
    train_tokenizer().save_pretrained(path)
    return str(path)


def flags(**values):
    defaults = {"index_path": None, "retriever_name": "bm25", "retriever_model": None, "faiss_gpu": False}
    return argparse.Namespace(**(defaults | values))


def test_saved_bm25_index_finds_what_the_one_in_memory_finds(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    build.main(["--corpus_path", str(corpus.path), "--save_dir", str(tmp_path / "index"), "--retriever_name", "bm25"])
    saved = load_index(flags(index_path=tmp_path / "index"), corpus)
    fresh = load_index(flags(), corpus)
    queries = ["word3", "word59 word0", "nothing"]
    assert saved.search(queries, 5) == fresh.search(queries, 5)
    assert saved.search(["word3"], 1)[0][0][0] == 3


def test_index_of_another_corpus_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    build.main(["--corpus_path", str(corpus.path), "--save_dir", str(tmp_path / "index"), "--retriever_name", "bm25"])
    other = write_corpus(tmp_path / "other.jsonl", count=61)
    with pytest.raises(UserError, match="another corpus"):
        load_index(flags(index_path=tmp_path / "index"), other)


def test_dense_index_finds_the_nearest_passage_and_never_row_minus_one(tmp_path, encoder_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", count=7)
    words = ["--corpus_path", str(corpus.path), "--save_dir", str(tmp_path / "index"), "--retriever_name", "bge"]
    build.main([*words, "--retriever_model", encoder_path])
    index = load_index(flags(index_path=tmp_path / "index", retriever_name="bge", retriever_model=encoder_path), corpus)
    encoder = Encoder("bge", encoder_path)
    passages = encoder.encode(list(corpus.contents()), "passage")
    query = encoder.encode(["word3"], "query")
    expected = np.argsort(-(passages @ query[0]))
    found = index.search(["word3"], 50)[0]
    assert [row for row, _ in found] == expected.tolist()
    assert np.allclose([score for _, score in found], np.sort(passages @ query[0])[::-1], atol=1e-5)


def test_corrupt_index_and_wrong_encoder_are_told(tmp_path, encoder_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", count=5)
    bad = tmp_path / "e5_Flat.index"
    bad.write_bytes(b"not an index")
    with pytest.raises(UserError, match="not readable as a FAISS index"):
        load_index(flags(index_path=bad, retriever_name="e5", retriever_model=encoder_path), corpus)
    with pytest.raises(UserError, match="needs --index_path"):
        load_index(flags(retriever_name="e5"), corpus)
    import faiss

    wrong = faiss.IndexFlatIP(8)
    wrong.add(np.zeros((5, 8), dtype=np.float32))
    faiss.write_index(wrong, str(bad))
    with pytest.raises(UserError, match="8 dimensions"):
        load_index(flags(index_path=bad, retriever_name="e5", retriever_model=encoder_path), corpus)


@pytest.mark.parametrize("pooling_family", ["e5", "bge", "dpr"])
def test_a_texts_vector_does_not_depend_on_its_neighbours(encoder_path, pooling_family):
    encoder = Encoder(pooling_family, encoder_path)
    texts = ["short", "a much longer text with many more words in it", "x"]
    together = encoder.encode(texts, "query")
    alone = np.concatenate([encoder.encode([text], "query") for text in texts])
    assert np.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("content", ["", "\n\n", "not json\n", '{"id": "1"}\n', '{"contents": 3}\n'])
def test_bad_corpus_is_told(tmp_path, content):
    path = tmp_path / "corpus.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"corpus\.jsonl"):
        Corpus(path)


@given(st.text(st.characters(exclude_characters="\n\r"), max_size=30), st.text(max_size=60))
def test_contents_split_into_title_and_text(title, text):
    found_title, found_text = split_contents(f'"{title}"\n{text}')
    assert found_title == title.strip().strip('"').strip()
    assert found_text == text.strip()


@given(st.text(max_size=40))
def test_canonical_url_is_idempotent_on_plain_paths(path):
    once = canonical_url("https://wiki.example/" + path.replace("%", ""))
    assert canonical_url(once.replace("%", "")) == once.replace("%", "") or "#" in once or " " in once
