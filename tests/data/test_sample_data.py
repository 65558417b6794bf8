"""The ten documents and ten questions that come with the Qwen3-0.6B recipe, and the script that serves them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from searchr1.commands import build_index as build
from searchr1.commands import retrieval_server as server_flags
from searchr1.data.dataset import load_dataset_files
from searchr1.rewards.answers import substring_match

EXAMPLES = Path(__file__).parents[2] / "examples/searchr1"
CORPUS, QUESTIONS = EXAMPLES / "sample_data/sample_corpus.jsonl", EXAMPLES / "sample_data/sample_train.jsonl"


def test_every_question_can_be_answered_from_the_documents(tokenizer):
    texts = [json.loads(line)["contents"] for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    samples = load_dataset_files(
        [QUESTIONS], tokenizer=tokenizer, max_prompt_length=2048, template="searchr1", apply_chat_template=True
    ).samples
    assert len(texts) == len(samples) == 10
    for sample in samples:
        assert sample.reward_name == "exact_match"
        assert any(substring_match(text, sample.golden_answers) for text in texts), sample.question


def test_the_script_builds_the_index_once_and_serves_it(tmp_path):
    program = tmp_path / "searchr1"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/$1\n')
    program.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)}

    def run(**variables):
        words = ["bash", EXAMPLES / "start_retriever.sh", "--port", "1234"]
        result = subprocess.run(words, env=env | variables, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert result.returncode == 0, result.stderr
        return server_flags.parse((tmp_path / "retrieval-server").read_text().splitlines()[1:])

    served = run()
    built = build.parse((tmp_path / "build-index").read_text().splitlines()[1:])
    assert Path(built.corpus_path) == Path(served.corpus_path) == CORPUS
    assert Path(built.save_dir) == Path(served.index_path)
    assert (built.retriever_name, served.retriever_name, served.port) == ("bm25", "bm25", 1234)
    (tmp_path / "build-index").unlink()
    index = tmp_path / "index"
    index.mkdir()
    (index / "manifest.json").write_text("{}")
    assert Path(run(index_dir=str(index)).index_path) == index
    assert not (tmp_path / "build-index").exists()
