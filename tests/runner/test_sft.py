"""Supervised fine-tuning: row shapes, masks, and a model that gets better."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from searchr1.errors import UserError
from searchr1.runner.sft import batches, load_rows, segments_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    from searchr1.data.demo_world.tokenizer import train_tokenizer

    return train_tokenizer()


def trained_text(row, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    [t], too_long = load_rows([path], tokenizer, 4096)
    assert too_long == 0
    ids = [*t.sample.prompt_ids, *t.response_ids.tolist()]
    return tokenizer.decode(ids), tokenizer.decode([i for i, m in zip(ids[1:], t.loss_mask, strict=True) if m])


def test_segments_are_trained_where_they_say_so(tokenizer, tmp_path):
    parts = [("Question: who?\n", False), ("<search> x</search>", True), ("Doc 1", False), ("<answer> y</answer>", True)]
    row = {"segments": [{"text": text, "train": train} for text, train in parts]}
    whole, trained = trained_text(row, tokenizer, tmp_path)
    assert whole == "".join(text for text, _ in parts)
    assert trained == "<search> x</search><answer> y</answer>"


def test_response_and_its_end_are_trained(tokenizer, tmp_path):
    _, trained = trained_text({"prompt": "Question: who?\n", "response": "me"}, tokenizer, tmp_path)
    assert trained == "me<|im_end|>"


def test_only_assistant_messages_are_trained(tokenizer, tmp_path):
    messages = [
        {"role": "user", "content": "who?"},
        {"role": "assistant", "content": "me"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "you"},
    ]
    whole, trained = trained_text({"messages": messages}, tokenizer, tmp_path)
    assert whole == "Question: who?\nmeQuestion: and?\nyou"
    assert trained == "meyou"


@pytest.mark.parametrize(
    "row",
    [{}, {"prompt": "a"}, {"segments": [{"text": "a", "train": False}]}, {"messages": [{"role": "user", "content": "a"}]}],
)
def test_rows_without_anything_to_train_on_are_told(row, tokenizer):
    with pytest.raises(UserError):
        segments_of(row, tokenizer)


def test_bad_row_is_named_by_file_and_line(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + '\n{"text": 1}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        load_rows([path], tokenizer, 100)


def test_every_row_is_used_once_an_epoch(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "response": "b" * (i + 1)}) + "\n" for i in range(40)))
    rows, _ = load_rows([path], tokenizer, 4096)
    seen = []
    for batch in batches(rows, 60, seed=0):
        seen += [t.sample.id for t in batch]
        if len(seen) >= 36:
            break
    assert len(set(seen[:36])) == 36


def test_a_batch_larger_than_the_data_reaches_into_the_next_epoch(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    rows, _ = load_rows([path], tokenizer, 4096)
    assert len(next(batches(rows, 30, seed=0))) == 10


def test_a_fresh_model_learns_and_loads(tokenizer, tmp_path):
    rows = [{"prompt": f"Question: {i}?\n", "response": " Silver Harbor"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = [sys.executable, "-m", "searchr1.cli", "sft", "--fresh", str(ROOT / "examples/demo/fresh_model"), "--tokenizer"]
    words += [str(tmp_path / "tokenizer"), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    words += ["--lr", "3e-3", "--tokens-per-batch", "200", "--max-steps", "40", "--device", "cpu"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", result.stdout)]
    assert losses[-1] < losses[0]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = found("Question: 7?\n", return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    assert found.decode(answer) == " Silver Harbor<|im_end|>"
    again = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert again.returncode == 2
    assert "not empty" in again.stderr
