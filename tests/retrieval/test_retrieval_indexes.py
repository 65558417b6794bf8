"""Indexes built, saved, refused; the dense path with a small random encoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xxhash

from searchr1.checkpoints.model_folder import hash_encoder
from searchr1.commands import build_index as build
from searchr1.errors import UserError
from searchr1.retrieval.encode.encoder import Encoder
from searchr1.retrieval.index.corpus import Corpus
from searchr1.retrieval.server.load import load_index
from searchr1.retrieval.server.options import ServerOptions


def write_corpus(path, count=60):
    words = [f"word{i}" for i in range(count)]
    with path.open("w") as file:
        for i, word in enumerate(words):
            file.write(
                json.dumps({"id": str(i), "contents": f'"{word}"\n{word} {word} and {words[(i + 1) % count]}'}) + "\n"
            )
    return Corpus(path)


def flags(**values):
    return ServerOptions(**{"retriever_name": "bm25", "threads": 1} | values)


def test_saved_bm25_index_finds_what_the_one_in_memory_finds(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    build.main(["--corpus_path", str(corpus.path), "--save_dir", str(tmp_path / "index"), "--retriever_name", "bm25"])
    saved = load_index(flags(index_path=tmp_path / "index"), corpus)
    fresh = load_index(flags(), corpus)
    queries = ["word3", "word59 word0", "nothing"]
    assert saved.search(queries, 5) == fresh.search(queries, 5)
    assert saved.search(["word3"], 1)[0][0][0] == 3


def test_index_of_another_corpus_is_rejected(tmp_path):
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


def test_corrupt_index_and_wrong_encoder_are_reported(tmp_path, encoder_path):
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


def built(tmp_path, *words, count=60):
    corpus = write_corpus(tmp_path / "corpus.jsonl", count=count)
    build.main(["--corpus_path", str(corpus.path), "--save_dir", str(tmp_path / "index"), *words])
    return corpus


def test_manifest_says_what_the_index_is(tmp_path, encoder_path):
    corpus = built(tmp_path, "--retriever_name", "e5", "--retriever_model", encoder_path, count=9)
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    file = tmp_path / "index" / "e5_Flat.index"
    digest = xxhash.xxh3_128_hexdigest(file.read_bytes())
    own = manifest.pop("xxh3")
    assert own == xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
    assert manifest == {
        "files": {"e5_Flat.index": {"bytes": file.stat().st_size, "xxh3": digest}},
        "kind": "dense",
        "rows": 9,
        "corpus": corpus.fingerprint(),
        "version": 2,
        "encoder": "e5",
        "model": encoder_path.rpartition("/")[2],
        "weights": hash_encoder(encoder_path),
        "encoder_dtype": "fp32",
        "pooling": "mean",
        "max_length": 256,
        "dimension": 32,
        "metric": "inner product",
        "factory": "Flat",
        "file": "e5_Flat.index",
    }
    assert sorted(file.name for file in (tmp_path / "index").iterdir()) == ["e5_Flat.index", "manifest.json"]


def test_another_retriever_than_the_indexs_is_rejected(tmp_path, encoder_path):
    corpus = built(tmp_path, "--retriever_name", "e5", "--retriever_model", encoder_path, count=5)
    with pytest.raises(UserError, match="is a e5 index"):
        load_index(flags(index_path=tmp_path / "index"), corpus)
    for path in (tmp_path / "index", tmp_path / "index/e5_Flat.index"):
        with pytest.raises(UserError, match="--retriever_name e5"):
            load_index(flags(index_path=path, retriever_name="bge", retriever_model=encoder_path), corpus)
        loaded = load_index(flags(index_path=path, retriever_name="e5", retriever_model=encoder_path), corpus)
        assert loaded.rows == 5


def test_bare_published_index_loads_and_its_rows_are_counted(tmp_path, encoder_path):
    corpus = built(tmp_path, "--retriever_name", "e5", "--retriever_model", encoder_path, count=5)
    (tmp_path / "index/manifest.json").unlink()
    args = flags(index_path=tmp_path / "index", retriever_name="e5", retriever_model=encoder_path)
    assert load_index(args, corpus).rows == 5
    with pytest.raises(UserError, match="has 5 rows, --corpus_path 6 passages"):
        load_index(args, write_corpus(tmp_path / "other.jsonl", count=6))


def test_an_unfinished_or_damaged_bm25_folder_is_rejected(tmp_path):
    corpus = built(tmp_path, "--retriever_name", "bm25")
    folder = tmp_path / "index"
    (folder / "vocab.index.json").write_text("{")
    with pytest.raises(UserError, match=r"vocab\.index\.json: has 1 bytes instead of"):
        load_index(flags(index_path=folder), corpus)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        load_index(flags(index_path=folder), corpus)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="no finished BM25 index"):
        load_index(flags(index_path=folder), corpus)


def test_a_bad_corpus_is_reported_before_an_older_index_is_touched(tmp_path):
    built(tmp_path, "--retriever_name", "bm25")
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write("broken\n")
    words = ["--corpus_path", str(tmp_path / "corpus.jsonl"), "--save_dir", str(tmp_path / "index")]
    words += ["--retriever_name", "bm25", "--overwrite"]
    with pytest.raises(UserError, match="line 61"):
        build.main(words)
    assert (tmp_path / "index/manifest.json").exists()


def test_stems_are_found_by_other_forms_of_the_word(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"contents": f'"T"\n{text}'}) + "\n" for text in ("the rivers run", "a mountain")))
    words = ["--corpus_path", str(path), "--save_dir", str(tmp_path / "index"), "--retriever_name", "bm25"]
    build.main([*words, "--stemmer", "english"])
    corpus = Corpus(path)
    stemmed = load_index(flags(index_path=tmp_path / "index"), corpus)
    assert [row for row, _ in stemmed.search(["which river"], 2)[0]] == [0]
    assert load_index(flags(), corpus).search(["which river"], 2) == [[]]
    with pytest.raises(UserError, match="--stemmer klingon: unknown"):
        build.main([*words, "--overwrite", "--stemmer", "klingon"])


@pytest.mark.parametrize(("factory", "found"), [("Nonsense7", None), ("IVF64,Flat", None), ("SQ8", 20), ("HNSW", 20)])
def test_faiss_factory_strings(tmp_path, encoder_path, factory, found):
    words = ["--retriever_name", "e5", "--retriever_model", encoder_path, "--faiss_type", factory]
    if found is None:
        with pytest.raises(UserError, match=f"--faiss_type {factory}"):
            built(tmp_path, *words, count=20)
        return
    corpus = built(tmp_path, *words, count=20)
    index = load_index(flags(index_path=tmp_path / "index", retriever_name="e5", retriever_model=encoder_path), corpus)
    assert len(index.search(["word3"], 100)[0]) == found


def test_a_fingerprint_sees_a_change_of_one_letter(tmp_path):
    path = tmp_path / "corpus.jsonl"
    before = write_corpus(path, count=3000).fingerprint()
    content = path.read_bytes()
    for word in (b"word7 and", b"word1500 and", b"and word0"):
        assert word in content
        path.write_bytes(content.replace(word, word.upper()))
        assert Corpus(path).fingerprint() != before


def test_a_missing_gpu_is_reported(encoder_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="no GPU"):
        Encoder("e5", encoder_path, device="cuda")
    with pytest.raises(UserError, match="cannot load an encoder"):
        Encoder("e5", encoder_path + "/nothing-here")


def test_pooling_and_prefix_of_each_family(encoder_path):
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(encoder_path), AutoModel.from_pretrained(encoder_path).eval()

    def states(text):
        with torch.inference_mode():
            return model(**tokenizer(text, return_tensors="pt"))

    def unit(vector):
        return vector / vector.norm()

    mean = unit(states("query: a river").last_hidden_state[0].mean(0))
    assert np.allclose(Encoder("e5", encoder_path).encode(["a river"], "query")[0], mean, atol=1e-5)
    mean = unit(states("passage: a river").last_hidden_state[0].mean(0))
    assert np.allclose(Encoder("e5", encoder_path).encode(["a river"], "passage")[0], mean, atol=1e-5)
    first = unit(states("Represent this sentence for searching relevant passages: a river").last_hidden_state[0, 0])
    assert np.allclose(Encoder("bge", encoder_path).encode(["a river"], "query")[0], first, atol=1e-5)
    pooler = states("a river").pooler_output[0]
    assert np.allclose(Encoder("dpr", encoder_path).encode(["a river"], "passage")[0], pooler, atol=1e-5)
    assert Encoder("dpr", encoder_path).encode([], "query").shape == (0, 32)
