"""The flags and files of Search-R1's index builder: embeddings that are kept, and embeddings that are brought along."""

from __future__ import annotations

import json

import faiss
import numpy as np
import pytest

from searchr1.commands import build_index as build
from searchr1.commands import rerank_server
from searchr1.commands import retrieval_server as server_flags
from searchr1.errors import UserError
from searchr1.retrieval.encode.encoder import Encoder
from searchr1.retrieval.index import build as index_build
from searchr1.retrieval.index.corpus import Corpus

WORDS = ["river", "mountain", "harbour", "lighthouse", "peat", "glass", "program", "engine", "moon", "salt"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("embedding") / "c.jsonl"
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 12)) for _ in range(90)]
    path.write_text("".join(json.dumps({"contents": f'"{row}"\n{text}'}) + "\n" for row, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def vectors(corpus, encoder_path):
    return Encoder("e5", encoder_path).encode(list(Corpus(corpus).contents()), "passage")


def command(corpus, out, encoder_path, *flags):
    words = ["--retrieval_method", "e5", "--model_path", encoder_path, "--corpus_path", str(corpus), "--save_dir", str(out)]
    return [*words, *flags]


@pytest.mark.parametrize("kind", ["Flat", "SQ8", "HNSW"])
def test_embeddings_are_kept_and_give_the_same_index_again(tmp_path, corpus, encoder_path, vectors, kind):
    assert build.main(command(corpus, tmp_path / "a", encoder_path, "--faiss_type", kind, "--save_embedding")) == 0
    kept = tmp_path / "a/emb_e5.memmap"
    found = np.memmap(kept, dtype=np.float32, mode="r").reshape(90, 32)  # as Search-R1 reads it
    np.testing.assert_allclose(found, vectors, atol=1e-5)
    assert json.loads((tmp_path / "a/manifest.json").read_text())["embedding"] == "emb_e5.memmap"
    words = command(corpus, tmp_path / "b", encoder_path, "--faiss_type", kind, "--embedding_path", str(kept))
    assert build.main(words) == 0
    a, b = (faiss.read_index(str(tmp_path / name / f"e5_{kind}.index")) for name in "ab")
    for row in range(90):  # a lossy index keeps its own vectors in half precision
        np.testing.assert_allclose(a.reconstruct(row), b.reconstruct(row), atol=0.01 if kind == "SQ8" else 0)
    assert build.main([*command(corpus, tmp_path / "a", encoder_path), "--overwrite"]) == 0
    assert not kept.exists(), "it was of the index that was replaced"


def test_embeddings_of_something_else_are_rejected(tmp_path, corpus, encoder_path, vectors):
    path = tmp_path / "emb.memmap"
    words = command(corpus, tmp_path / "index", encoder_path, "--embedding_path", str(path))
    with pytest.raises(UserError, match=r"no such file; 11520 bytes are expected \(90 passages x 32"):
        build.main(words)
    vectors[:89].tofile(path)
    with pytest.raises(UserError, match="has 11392 bytes; 11520 bytes"):
        build.main(words)
    vectors[::-1].astype(np.float32).tofile(path)
    with pytest.raises(UserError, match=r"is not of this corpus and encoder: .*% of 16 passages"):
        build.main(words)
    np.full((90, 32), np.nan, np.float32).tofile(path)
    with pytest.raises(UserError, match="is not of this corpus"):
        build.main(words)
    (vectors * 3).astype(np.float16).astype(np.float32).tofile(path)  # neither normalised nor exact
    assert build.main(words) == 0


def test_embeddings_that_changed_are_not_gone_on_with(tmp_path, corpus, encoder_path, vectors, monkeypatch):
    path = tmp_path / "emb.memmap"
    vectors.tofile(path)
    words = command(corpus, tmp_path / "index", encoder_path, "--embedding_path", str(path))
    monkeypatch.setattr(index_build, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build.main(words)
    monkeypatch.undo()
    (vectors + 1e-4).astype(np.float32).tofile(path)
    with pytest.raises(UserError, match=r"made otherwise \(given was"):
        build.main(words)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--stemmer", "english"], "--stemmer: is for --retriever_name bm25 only"),
        (["--tokenizer", "words"], "--tokenizer: is for --retriever_name bm25 only"),
        (["--embedding_path", "s/e", "--overwrite"], "--overwrite might remove it"),
        (["--embedding_path", "e", "--save_embedding"], "--save_embedding: the vectors are in --embedding_path"),
    ],
)
def test_flags_that_do_not_go_together(flags, problem):
    with pytest.raises(UserError, match=problem):
        build.parse(["--retrieval_method", "e5", "--model_path", "m", "--corpus_path", "c", "--save_dir", "s", *flags])


def test_search_r1s_script_is_read_and_what_has_no_effect_is_said(capsys):
    theirs = (
        "--model_path m --corpus_path c --save_dir s --use_fp16 --max_length 256 --batch_size 512 --pooling_method mean "
        "--faiss_type Flat --save_embedding --faiss_gpu"
    ).split()
    args = build.parse(["--retrieval_method", "e5", *theirs])
    assert (args.save_embedding, args.dtype, args.batch_size) == (True, "fp16", 512)
    assert "--faiss_gpu: the index is made on the CPU" in capsys.readouterr().out
    build.parse(["--retrieval_method", "bm25", *theirs])
    said = capsys.readouterr().out
    assert "bm25 makes no use of --batch_size, --dtype, --faiss_gpu, --pooling_method, --retriever_model" in said


def test_the_flags_of_search_r1s_rerank_servers():
    words = ["--corpus_path", "c", "--index_path", "i", "--faiss_gpu"]
    theirs = ["--retrieval_topk", "20", "--reranking_topk", "5", "--reranker_batch_size", "32"]
    args = server_flags.parse([*words, *theirs, "--reranker_model", "m"])
    assert (args.topk_retrieval, args.topk_rerank, args.topk, args.reranker_batch_size) == (20, 5, 5, 32)
    assert server_flags.parse([*words, "--reranker_model", "m"]).topk_retrieval == 10
    for flag in ("--retrieval_topk", "--reranking_topk", "--reranker_batch_size"):
        with pytest.raises(UserError, match="needs a reranker"):
            server_flags.parse([*words, flag, "5"])
    with pytest.raises(UserError, match="--reranker_batch_size: is a flag of the rerank-server"):
        server_flags.parse([*words, "--reranker_url", "h:1", "--reranker_batch_size", "5"])
    with pytest.raises(UserError, match="--reranker_batch_size 0"):
        server_flags.parse([*words, "--reranker_model", "m", "--reranker_batch_size", "0"])
    theirs = "--rerank_model_name_or_path m --reranking_topk 4 --batch_size 8 --max_length 128"
    args = rerank_server.parse([*theirs.split(), "--reranker_type", "sentence_transformer"])
    assert (args.reranker_model, args.rerank_topk, args.rerank_batch_size, args.rerank_max_length) == ("m", 4, 8, 128)
