"""What `sft` and the loader are given: rows, chat templates, models and folders that cannot be used are one sentence."""

from __future__ import annotations

import copy
import json

import pytest

from searchr1.commands.sft import parse
from searchr1.data.dataset import load_dataset_files
from searchr1.data.model_source import load_tokenizer, looks_local
from searchr1.demo.cold_start_rows import train_tokenizer
from searchr1.demo.demo import COLD_START
from searchr1.errors import UserError
from searchr1.training.sft_data import load_rows

USER = {"role": "user", "content": "who?"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


FAILS = {
    "{{ raise_exception('no \\n role tool') if messages[-1].role == 'user' }}": "no role tool",
    "{{ messages[0].nosuch.deeper }}": "nosuch",
    "{{ messages[99].content }}": "",
    "{{ ''.__class__.__mro__ }}": "",
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages[0].content + 1 }}": "",
    "{% for m in messages %}": "",
    "{{ messages | nosuch }}": "nosuch",
}
"""Templates, and what the message quotes of their failure."""


@pytest.mark.parametrize("template", FAILS)
def test_whatever_a_chat_template_does_is_one_sentence(template, tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    rows, prompts = tmp_path / "rows.jsonl", tmp_path / "prompts.jsonl"
    rows.write_text(json.dumps({"messages": [USER, {"role": "assistant", "content": "a"}]}) + "\n", encoding="utf-8")
    prompts.write_text(json.dumps({"prompt": [USER], "solutions": "a"}) + "\n", encoding="utf-8")
    for load in (
        lambda: load_rows([rows], other, 100),
        lambda: load_dataset_files([prompts], tokenizer=other, max_prompt_length=100),
    ):
        with pytest.raises(UserError, match=r"\.jsonl:1: the model's chat template .*") as error:
            load()
        assert "\n" not in str(error.value)
        assert FAILS[template] in str(error.value)
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("row", ['["a"]', '"text"', "7", "null", "true", "[[]]", "{}", "[" * 50_000, '{"a": ' * 50_000])
def test_a_row_that_is_no_object_or_too_deep_is_named_by_its_line(row, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + f"\n\n{row}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^[^\n]*rows\.jsonl:3: [^\n]*$") as error:
        load_rows([path], tokenizer, 100)
    assert len(str(error.value)) < 400


def test_columns_of_any_name_and_number_make_a_short_message(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"a\nb\x1b[2J\ud83d": 1, "x" * 10**6: 2} | {f"c{number}": 0 for number in range(1000)}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_rows([path], tokenizer, 100)
    said = str(error.value)
    assert r"the row's columns are a\nb\x1b[2J\ud83d, xxx" in said
    assert said.endswith("c17, and 982 more")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("/no/such/model", "no such folder"),
        ("./model", "no such folder"),
        ("{folder}/empty/nosuch", "no such folder"),
        ("{folder}/empty", "has no config.json"),
        ("{folder}/file", "is a file"),
        ("{folder}/checkpoint", "is a training checkpoint; convert it first"),
        ("", "is empty"),
    ],
)
@pytest.mark.parametrize("flag", ["--model", "--fresh"])
def test_a_model_that_is_not_there_is_one_sentence(flag, source, said, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "checkpoint/actor").mkdir(parents=True)
    words = [flag, source.format(folder=tmp_path), "--tokenizer", str(COLD_START), "--data", "rows.jsonl"]
    with pytest.raises(UserError, match=rf"^{flag}: [^\n]*{said}[^\n]*$"):
        parse([*words, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_folder_beside_others_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/qwen").mkdir(parents=True)
    assert looks_local("models/qwem")
    assert looks_local("models")
    assert not looks_local("Qwen/Qwen2.5-3B")
    assert not looks_local("gpt2")


@pytest.mark.parametrize("content", ["", "{}", "[]", "\x00", '{"model": 7}', "[" * 100_000])
def test_a_tokenizer_that_cannot_be_read_is_one_sentence(content, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"^--tokenizer: [^\n]*(its tokenizer cannot be loaded \([^\n]*\)|nested too deeply; get it again)$"
    ):
        load_tokenizer(str(tmp_path), "--tokenizer")


@pytest.mark.parametrize("place", ["{folder}/file/out", "/proc/out", "{folder}/file"])
def test_an_output_that_cannot_be_written_is_known_before_the_training(place, tmp_path):
    (tmp_path / "file").touch()
    words = ["--model", str(COLD_START), "--data", "rows.jsonl", "--output", place.format(folder=tmp_path)]
    with pytest.raises(UserError, match=r"^--output .*: (cannot be made|is not writable)"):
        parse(words)
