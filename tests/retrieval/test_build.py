"""Indexes built by several processes, stopped at any moment, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bm25s
import faiss
import numpy as np
import pytest

from searchr1.commands import build_index as build
from searchr1.errors import UserError
from searchr1.retrieval.encode.embedding_folder import PART_ROWS
from searchr1.retrieval.encode.encoder import Encoder
from searchr1.retrieval.index import bm25_build
from searchr1.retrieval.index.bm25_index import Bm25Index
from searchr1.retrieval.index.corpus import Corpus
from searchr1.retrieval.server.load import load_index
from searchr1.retrieval.server.options import ServerOptions


def write_corpus(path, rows):
    rng = np.random.default_rng(7)
    with path.open("w") as file:
        for row in range(rows):
            text = " ".join(f"w{word}" for word in rng.zipf(1.3, int(rng.integers(0, 40))) % 700)
            file.write(json.dumps({"id": str(row), "contents": f'"Title {row}"\n{text}'}) + "\n")
    return path


def command(corpus, out, encoder_path, *flags):
    words = ["--corpus_path", str(corpus), "--save_dir", str(out), "--retriever_name", "e5"]
    return [*words, "--retriever_model", encoder_path, *flags]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, encoder_path):
    """A corpus of three parts and its index, built without a break."""
    folder = tmp_path_factory.mktemp("whole")
    corpus = write_corpus(folder / "corpus.jsonl", 10_000)
    assert build.main(command(corpus, folder / "index", encoder_path, "--faiss_type", "IVFPQ")) == 0
    return corpus, folder / "index"


def stopped(words, folder, by):
    """A build in another process, stopped by a signal after its first part; gives its exit code, errors and children."""
    process = subprocess.Popen(
        [sys.executable, "-m", "searchr1.cli", "build-index", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background may have had SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 200
        while not list((folder / "embedding").glob("part-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
        if by == signal.SIGINT:  # as Ctrl-C: to the whole group
            os.killpg(process.pid, by)
        else:
            process.send_signal(by)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors, children
    finally:
        process.kill()
        process.wait()


def ended(process):
    """Whether a process is gone, or only waits for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for_the_end_of(children):
    """Multiprocessing's own resource tracker, one of them, ends a moment after its parent has."""
    deadline = time.monotonic() + 10
    while not all(ended(child) for child in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


@pytest.mark.parametrize("flags", [(), pytest.param(("--processes", "2"), marks=pytest.mark.slow)])
def test_killed_and_gone_on_gives_the_same_index(tmp_path, whole, encoder_path, flags):
    corpus, expected = whole
    words = command(corpus, tmp_path / "index", encoder_path, "--faiss_type", "IVFPQ", *flags)
    _, _, children = stopped(words, tmp_path / "index", signal.SIGKILL)
    assert len(children) >= 2 * bool(flags)
    wait_for_the_end_of(children)
    assert not (tmp_path / "index" / "manifest.json").exists()
    done = len(list((tmp_path / "index" / "embedding").glob("part-*")))
    assert 1 <= done <= 3
    with pytest.raises(UserError, match=r"made otherwise \(max_length was 256, is 64\)"):
        build.main([*words, "--max_length", "64"])
    assert build.main(words) == 0
    assert contents(tmp_path / "index") == contents(expected)
    assert not (tmp_path / "index" / "embedding").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "code", "flags"),
    [(signal.SIGINT, 130, ()), (signal.SIGINT, 130, ("--processes", "2")), (signal.SIGTERM, 143, ("--processes", "2"))],
)
def test_a_stop_is_answered_shortly_and_a_flat_index_goes_on(tmp_path, whole, encoder_path, by, code, flags):
    corpus, _ = whole
    words = command(corpus, tmp_path / "index", encoder_path, *flags)
    found, errors, children = stopped(words, tmp_path / "index", by)
    assert found == code, errors
    assert "Traceback" not in errors
    assert f"searchr1 build-index: stopped by {by.name}\n" in errors
    wait_for_the_end_of(children)
    with pytest.raises(RuntimeError, match="Index type"):  # unfinished: no index yet
        faiss.read_index(str(tmp_path / "index" / "e5_Flat.index"))
    assert build.main(words) == 0
    assert build.main(command(corpus, tmp_path / "other", encoder_path)) == 0
    assert contents(tmp_path / "index") == contents(tmp_path / "other")


def test_a_flat_index_is_the_file_that_faiss_would_write(tmp_path, encoder_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", 300)
    assert build.main(command(corpus, tmp_path / "index", encoder_path)) == 0
    vectors = Encoder("e5", encoder_path).encode(list(Corpus(corpus).contents()), "passage")
    index = faiss.IndexFlatIP(32)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "faiss.index"))
    assert (tmp_path / "index" / "e5_Flat.index").read_bytes() == (tmp_path / "faiss.index").read_bytes()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """80,000 vectors of 4 KB are 312 MiB in the file, and nowhere else."""
    import torch
    from transformers import BertConfig, BertModel

    from searchr1.demo.cold_start_rows import train_tokenizer

    config = BertConfig(vocab_size=2048, hidden_size=1024, num_hidden_layers=0, num_attention_heads=1, pad_token_id=0)
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    train_tokenizer().save_pretrained(tmp_path / "encoder")
    code = "import resource, sys; from searchr1.cli import main; main(sys.argv[1:]); " \
           "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"  # fmt: skip
    # With env.sh's settings the allocator keeps what is freed, and how much of it fits again is luck.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    peaks = []
    for rows in (5 * PART_ROWS, 80_000):
        corpus = tmp_path / f"{rows}.jsonl"
        corpus.write_text("".join(f'{{"contents": "passage {row % 100}"}}\n' for row in range(rows)))
        words = command(corpus, tmp_path / f"index{rows}", str(tmp_path / "encoder"))
        done = subprocess.run(
            [sys.executable, "-c", code, "build-index", *words], env=environment, check=True, capture_output=True, text=True,
            timeout=250,
        )  # fmt: skip
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert (tmp_path / "index80000" / "e5_Flat.index").stat().st_size > 300 << 20
    # Less than half of the vectors; from run to run peaks differ by 60 MiB.
    assert peaks[1] - peaks[0] < 150, peaks


def test_a_part_that_was_half_written_is_written_again(tmp_path, whole, encoder_path, monkeypatch):
    corpus, expected = whole
    words = command(corpus, tmp_path / "index", encoder_path, "--faiss_type", "IVFPQ")
    from searchr1.retrieval.encode import embedding_folder

    write = embedding_folder.EmbeddingFolder.write

    def write_one(self, part, vectors):
        if part == 1:
            raise KeyboardInterrupt
        write(self, part, vectors)

    monkeypatch.setattr(embedding_folder.EmbeddingFolder, "write", write_one)
    with pytest.raises(KeyboardInterrupt):
        build.main(words)
    monkeypatch.undo()
    with (tmp_path / "index" / "vectors.f16").open("r+b") as file:  # as a kill in the middle of part 1 would leave it
        file.seek(PART_ROWS * 32 * 2)
        file.write(b"\x55" * 1000)
    assert build.main(words) == 0
    assert contents(tmp_path / "index") == contents(expected)


def test_a_worker_that_dies_is_reported_and_the_next_start_goes_on(tmp_path, whole, encoder_path, monkeypatch):
    corpus, _ = whole
    words = command(corpus, tmp_path / "index", encoder_path, "--processes", "2")
    from searchr1.retrieval.encode import embed

    monkeypatch.setattr(embed, "_work", dies)
    with pytest.raises(UserError, match=r"a process that embeds died .*run the same command again"):
        build.main(words)
    monkeypatch.undo()
    assert build.main(command(corpus, tmp_path / "index", encoder_path)) == 0


def dies(*_):
    import os

    os._exit(9)


def flags(**values):
    return ServerOptions(**{"threads": 1} | values)


def test_a_lossy_index_finds_what_an_exact_one_finds(tmp_path, whole, encoder_path):
    corpus_path, folder = whole
    corpus = Corpus(corpus_path)
    assert build.main(command(corpus_path, tmp_path / "flat", encoder_path)) == 0
    assert not list((tmp_path / "flat").glob("vectors*"))
    common = {"retriever_name": "e5", "retriever_model": encoder_path}
    exact = load_index(flags(index_path=tmp_path / "flat", **common), corpus)
    lossy = load_index(flags(index_path=folder, nprobe=10_000, refine_factor=4000, **common), corpus)
    queries = [f"w{number} w{number + 1}" for number in range(10)]
    for one, other in zip(exact.search(queries, 3), lossy.search(queries, 3), strict=True):
        assert np.allclose([score for _, score in one], [score for _, score in other], atol=2e-3)  # vectors in fp16
    with pytest.raises(UserError, match="no exact vectors"):
        load_index(flags(index_path=tmp_path / "flat", refine_factor=3, **common), corpus)
    with pytest.raises(UserError, match="--ef_search 5: this index has no such parameter"):
        load_index(flags(index_path=folder, ef_search=5, **common), corpus)


def test_vectors_of_the_wrong_size_and_other_weights_are_rejected(tmp_path, whole, encoder_path):
    corpus_path, folder = whole
    shutil.copytree(folder, tmp_path / "index")
    with (tmp_path / "index" / "vectors.f16").open("r+b") as file:
        file.truncate(1000)
    common = {"retriever_name": "e5", "retriever_model": encoder_path}
    with pytest.raises(UserError, match=r"vectors.f16: has 1000 bytes"):
        load_index(flags(index_path=tmp_path / "index", **common), Corpus(corpus_path))
    other = tmp_path / "other"
    shutil.copytree(encoder_path, other)
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[:-4] + b"\x00\x00\x00\x3f")
    common["retriever_model"] = str(other)
    with pytest.raises(UserError, match="built with other weights"):
        load_index(flags(index_path=folder, **common), Corpus(corpus_path))


@pytest.mark.parametrize("stemmer", [None, "english"])
@pytest.mark.parametrize(("block", "postings"), [(20_000, 1 << 25), (7, 50), (100, 1)])
def test_streamed_bm25_is_the_index_of_bm25s(tmp_path, monkeypatch, stemmer, block, postings):
    monkeypatch.setattr(bm25_build, "PASSAGES", block)
    monkeypatch.setattr(bm25_build, "POSTINGS", postings)
    corpus = Corpus(write_corpus(tmp_path / "corpus.jsonl", 120))
    (tmp_path / "index").mkdir()
    bm25_build.build_bm25(corpus, tmp_path / "index", stemmer)
    assert not (tmp_path / "index" / "scratch").exists()
    ours = bm25s.BM25.load(str(tmp_path / "index"), mmap=True)
    theirs = Bm25Index.build(corpus.contents(), stemmer)._retriever
    assert ours.scores["num_docs"] == theirs.scores["num_docs"]
    assert set(ours.vocab_dict) == set(theirs.vocab_dict) - {""}
    for word, number in ours.vocab_dict.items():
        for name in ("indices", "data"):
            found, wanted = (
                list_of(index, name, place) for index, place in ((ours, number), (theirs, theirs.vocab_dict[word]))
            )
            np.testing.assert_allclose(found, wanted, atol=1e-6)
    queries = ["w1 w2 w3", "title 7", "w5 w5 nothing", ""]
    saved, fresh = Bm25Index.load(tmp_path / "index", stemmer), Bm25Index.build(corpus.contents(), stemmer)
    assert_same_hits(saved.search(queries, 9), fresh.search(queries, 9))


def assert_same_hits(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert [row for row, _ in one] == [row for row, _ in other]
        np.testing.assert_allclose([score for _, score in one], [score for _, score in other], atol=1e-5)


def list_of(index, name, word):
    scores = index.scores
    return scores[name][scores["indptr"][word] : scores["indptr"][word + 1]]


def test_a_corpus_without_words_is_reported(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"contents": "? !"}\n')
    with pytest.raises(UserError, match="has no words"):
        build.main(
            ["--corpus_path", str(tmp_path / "corpus.jsonl"), "--save_dir", str(tmp_path), "--retriever_name", "bm25"]
        )


def test_a_server_pools_as_the_index_was_built(tmp_path, encoder_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", 60)
    assert build.main(command(corpus, tmp_path / "index", encoder_path, "--pooling_method", "cls")) == 0
    index = load_index(
        flags(index_path=tmp_path / "index", retriever_name="e5", retriever_model=encoder_path), Corpus(corpus)
    )
    encoder = Encoder("e5", encoder_path, pooling="cls")
    passages = encoder.encode(list(Corpus(corpus).contents()), "passage")
    scores = passages @ encoder.encode(["w1 w2"], "query")[0]
    assert [score for _, score in index.search(["w1 w2"], 5)[0]] == pytest.approx(np.sort(scores)[::-1][:5], abs=1e-5)
