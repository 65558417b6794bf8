"""What build-index refuses, and that it removes nothing that it did not make."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import transformers

from searchr1.commands import build_index as build
from searchr1.errors import UserError
from searchr1.files.folder_lock import folder_lock
from searchr1.retrieval.encode import embedding_folder
from searchr1.retrieval.encode.encoder import Encoder
from searchr1.retrieval.index import build as index_build
from searchr1.retrieval.index.corpus import Corpus
from searchr1.retrieval.index.manifest import check_encoder, read_manifest


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"contents": f'"T{row}"\npassage {row}'}) + "\n" for row in range(50)))
    return path


@pytest.fixture
def words(tmp_path, corpus, encoder_path):
    """A command without an index type."""
    flags = ["--corpus_path", str(corpus), "--save_dir", str(tmp_path / "index"), "--retriever_name", "e5"]
    return [*flags, "--retriever_model", encoder_path]


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_finished_index_is_replaced_only_on_request(tmp_path, words):
    assert build.main([*words, "--faiss_type", "SQ8"]) == 0
    (tmp_path / "index" / "notes.txt").write_text("mine")
    assert names(tmp_path / "index") == ["e5_SQ8.index", "manifest.json", "notes.txt", "vectors.f16"]
    with pytest.raises(UserError, match="holds a finished index; give --overwrite"):
        build.main(words)
    assert build.main([*words, "--overwrite"]) == 0
    assert names(tmp_path / "index") == ["e5_Flat.index", "manifest.json", "notes.txt"]
    assert (tmp_path / "index" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("name", "kind"), [("e5_Flat.index", "Flat"), ("vectors.f16", "SQ8"), ("e5_SQ8.index", "SQ8")])
def test_a_file_of_somebody_else_is_not_written_over(tmp_path, words, name, kind):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / name).write_bytes(b"downloaded")
    with pytest.raises(UserError, match=f"holds {name}, which is not of an unfinished build"):
        build.main([*words, "--faiss_type", kind])
    assert (tmp_path / "index" / name).read_bytes() == b"downloaded"
    assert build.main([*words, "--faiss_type", kind, "--overwrite"]) == 0


def test_a_folder_of_somebody_else_stays(tmp_path, words):
    (tmp_path / "index" / "embedding").mkdir(parents=True)
    (tmp_path / "index" / "embedding" / "part-000000").write_text("mine")
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="is not a folder of this command"):
            build.main([*words, *more])
    assert (tmp_path / "index" / "embedding" / "part-000000").read_text() == "mine"


def test_a_stop_before_the_manifest_costs_no_embedding(tmp_path, words, monkeypatch):
    for kind in ("Flat", "SQ8", "HNSW"):
        flags = [*words, "--faiss_type", kind, "--save_dir", str(tmp_path / kind)]
        with monkeypatch.context() as patch:
            patch.setattr(index_build, "write_manifest", interrupted)
            with pytest.raises(KeyboardInterrupt):
                build.main(flags)
        assert not (tmp_path / kind / "manifest.json").exists()
        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "encode", interrupted)  # nothing is left to encode
            assert build.main(flags) == 0
        assert build.main([*words, "--faiss_type", kind, "--save_dir", str(tmp_path / f"{kind}2")]) == 0
        assert names(tmp_path / kind) == names(tmp_path / f"{kind}2")
        for name in names(tmp_path / kind):
            assert (tmp_path / kind / name).read_bytes() == (tmp_path / f"{kind}2" / name).read_bytes()


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_another_plan_is_rejected_until_overwritten(tmp_path, words, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(index_build, "write_index", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build.main([*words, "--faiss_type", "SQ8"])
    differences = r"\(pooling was mean, is cls; encoder_dtype was fp32, is bf16\)"
    with pytest.raises(UserError, match=differences):
        build.main([*words, "--faiss_type", "SQ8", "--pooling_method", "cls", "--dtype", "bf16"])
    with pytest.raises(UserError, match=r"file was vectors\.f16, is e5_Flat\.index"):
        build.main(words)
    assert build.main([*words, "--overwrite"]) == 0
    assert names(tmp_path / "index") == ["e5_Flat.index", "manifest.json"]


def test_two_builds_in_one_folder(tmp_path, words):
    with folder_lock(tmp_path / "index", "--save_dir", "a build"), pytest.raises(UserError, match="is in use by a build on"):
        build.main(words)
    assert build.main(words) == 0
    with pytest.raises(UserError, match=r"--save_dir: cannot write .*corpus\.jsonl"):
        build.main([*words, "--save_dir", words[1]])


def test_a_bad_row_is_named_before_anything_is_touched(tmp_path, corpus, words):
    assert build.main(words) == 0
    with corpus.open("a") as file:
        file.write('{"contents": 7}\n')
    with pytest.raises(UserError, match="line 51"):
        build.main([*words, "--overwrite"])
    assert names(tmp_path / "index") == ["e5_Flat.index", "manifest.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--faiss_type", "Nonsense7"], "--faiss_type Nonsense7: FAISS cannot make this index"),
        (["--max_length", "1024"], "--max_length 1024: this encoder reads 512 tokens; give --max_length 512"),
        (["--use_fp16"], "--dtype fp16: needs a GPU"),
        (["--batch_size", "0"], "must be at least 1"),
        (["--processes", "2", "--devices", "cpu,cpu"], "leave one of them out"),
        (["--retriever_name", "bge", "--pooling_method", "median"], "--pooling_method median: unknown"),
    ],
)
def test_flags_that_cannot_be_followed_leave_the_older_index(tmp_path, words, flags, message):
    assert build.main(words) == 0
    with pytest.raises(UserError, match=message):
        build.main([*words, "--overwrite", *flags])
    assert names(tmp_path / "index") == ["e5_Flat.index", "manifest.json"]


def test_a_disk_that_is_too_small_is_reported_before_the_work(tmp_path, words, monkeypatch):
    usage = namedtuple("usage", "free")
    needed = 50 * 32 * 2 * 2  # vectors in two bytes, and the index as much again
    monkeypatch.setattr(embedding_folder.shutil, "disk_usage", lambda _: usage(needed - 1))
    with pytest.raises(UserError, match=r"the index needs 0\.0 GiB of disk"):
        build.main([*words, "--faiss_type", "SQ8"])
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(embedding_folder.shutil, "disk_usage", lambda _: usage(needed))
    assert build.main([*words, "--faiss_type", "SQ8"]) == 0


def test_vectors_that_are_no_numbers_are_reported(words, monkeypatch):
    encode = Encoder.encode

    def overflowing(self, texts, role):
        vectors = encode(self, texts, role)
        vectors[7, 3] = np.inf
        return vectors

    monkeypatch.setattr(Encoder, "encode", overflowing)
    with pytest.raises(UserError, match="--dtype fp32: the vector of passage 7 "):
        build.main(words)


def test_dprs_encoders_are_not_exchanged(tmp_path, corpus, words, encoder_path):
    config = transformers.DPRConfig(
        vocab_size=2048, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    for name in ("DPRQuestionEncoder", "DPRContextEncoder"):
        shutil.copytree(encoder_path, tmp_path / name)
        getattr(transformers, name)(config).save_pretrained(tmp_path / name)
    dpr = [*words, "--retriever_name", "dpr", "--retriever_model"]
    with pytest.raises(UserError, match="encodes questions; an index needs the encoder of passages"):
        build.main([*dpr, str(tmp_path / "DPRQuestionEncoder")])
    assert build.main([*dpr, str(tmp_path / "DPRContextEncoder")]) == 0
    manifest = read_manifest(tmp_path / "index", Corpus(corpus), "dpr")
    check_encoder(manifest, Encoder("dpr", str(tmp_path / "DPRQuestionEncoder")), tmp_path / "index")
    with pytest.raises(UserError, match="encodes passages; a server needs the encoder of questions"):
        check_encoder(manifest, Encoder("dpr", str(tmp_path / "DPRContextEncoder")), tmp_path / "index")


def test_a_manifest_of_a_later_format_and_another_pooling(tmp_path, corpus, words, encoder_path):
    assert build.main(words) == 0
    manifest = read_manifest(tmp_path / "index", Corpus(corpus), "e5")
    with pytest.raises(UserError, match="with --pooling_method mean, the server was started with cls"):
        check_encoder(manifest, Encoder("e5", encoder_path, pooling="cls"), tmp_path / "index")
    path = tmp_path / "index" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3}))
    with pytest.raises(UserError, match="has format 3, this searchr1 knows 2"):
        read_manifest(tmp_path / "index", Corpus(corpus), "e5")


def test_search_r1s_names_of_the_flags():
    theirs = (
        "--retrieval_method bge --model_path m --corpus_path c --save_dir s --use_fp16 --max_length 180 --batch_size 512"
    )
    args = build.parse([*theirs.split(), "--pooling_method", "cls", "--faiss_type", "Flat"])
    assert (args.retriever_name, args.retriever_model, args.dtype) == ("bge", "m", "fp16")
    assert (args.max_length, args.batch_size, args.pooling_method) == (180, 512, "cls")


@pytest.mark.slow
def test_what_goes_wrong_in_a_worker_is_reported(words, monkeypatch):
    monkeypatch.setattr(embedding_folder.EmbeddingPlan.__init__, "__defaults__", (0, 10))  # parts of ten rows
    with pytest.raises(UserError, match="--device cuda:7: this machine has"):
        build.main([*words, "--devices", "cpu,cuda:7"])
    assert build.main(words) == 0
