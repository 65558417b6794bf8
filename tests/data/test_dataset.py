from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.question_rows import RLINF, load, write_jsonl

from searchr1.data.prompts import fill_template
from searchr1.errors import UserError

SEARCHR1 = {
    "data_source": "nq",
    "prompt": [{"role": "user", "content": "Answer the question. Question: Who?\n"}],
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": ["Ann"]}},
    "extra_info": {"split": "train", "index": 41},
}
SMALL = {"data_source": "sample", "prompt": "Who?", "ability": "search", "reward_model": "f1_score", "answer": "Ann"}
FLASHRAG = {"id": "test_3", "question": "Who?", "golden_answers": ["Ann"]}


def test_rlinf_rows(tmp_path, tokenizer):
    data = load(write_jsonl(tmp_path / "own.jsonl", RLINF, RLINF), tokenizer=tokenizer)
    first, second = data.samples
    assert (first.id, second.id) == ("own/0", "own/1")
    assert first.golden_answers == ["Ann", "Anna"]
    assert first.data_source == "own"
    assert first.question == "Who?"
    assert first.reward_name is None
    assert tokenizer.decode(first.prompt_ids).replace(" ", "") == "Who?"
    assert str(data.stats) == "2 of 2 rows"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_searchr1_rows(tmp_path, tokenizer, kind):
    path = tmp_path / f"train.{kind}"
    if kind == "jsonl":
        write_jsonl(path, SEARCHR1)
    else:
        pq.write_table(pa.Table.from_pylist([SEARCHR1]), path)
    (sample,) = load(path, tokenizer=tokenizer).samples
    assert sample.id == "nq/41"
    assert sample.data_source == "nq"
    assert sample.golden_answers == ["Ann"]
    assert sample.question == "Who?"
    assert sample.reward_name is None
    rendered = "<user>Answer the question. Question: Who?\n</user><assistant>"
    assert sample.prompt_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_rows_that_name_their_reward(tmp_path, tokenizer):
    (sample,) = load(write_jsonl(tmp_path / "a.jsonl", SMALL), tokenizer=tokenizer).samples
    assert sample.reward_name == "f1_score"
    assert sample.data_source == "sample"
    assert sample.golden_answers == ["Ann"]


def test_rows_may_bring_the_passages_of_their_prompt(tmp_path, tokenizer):
    rows = [FLASHRAG | {"passages": "Doc 1(Title: ) Ann"}, FLASHRAG | {"passages": "Doc 1(Title: ) Bob"}]
    path = write_jsonl(tmp_path / "nq.jsonl", *rows)
    with_passages = load(path, tokenizer=tokenizer, template="rag", max_prompt_length=5000).samples
    texts = [fill_template("rag", "Who?", row["passages"]) for row in rows]
    assert [sample.prompt_ids for sample in with_passages] == [tokenizer(text)["input_ids"] for text in texts]
    assert load(path, tokenizer=tokenizer, template="demo").samples[0].question == "Who?"
    for row, message in ((FLASHRAG, "none came"), (FLASHRAG | {"passages": ["Doc"]}, "passages are a list")):
        with pytest.raises(UserError, match=message):
            load(write_jsonl(tmp_path / "bad.jsonl", row), tokenizer=tokenizer, template="rag")


def test_flashrag_rows_take_a_template(tmp_path, tokenizer):
    (sample,) = load(write_jsonl(tmp_path / "nq.jsonl", FLASHRAG), tokenizer=tokenizer, template="demo").samples
    assert sample.id == "nq/test_3"
    assert sample.question == "Who?"
    assert len(sample.prompt_ids) == len("Question: Who?\n")


def test_other_column_names(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "Who?", "gold": 1066, "answer": "no"})
    (sample,) = load(path, tokenizer=tokenizer, prompt_key="text", answer_key="gold").samples
    assert sample.golden_answers == ["1066"]


def test_files_follow_each_other_and_data_size_counts_over_all(tmp_path, tokenizer):
    one = write_jsonl(tmp_path / "one.jsonl", RLINF, "", RLINF)
    two = write_jsonl(tmp_path / "two.jsonl", RLINF, RLINF)
    assert [s.id for s in load(one, two, tokenizer=tokenizer).samples] == ["one/0", "one/2", "two/0", "two/1"]
    assert [s.id for s in load(one, two, tokenizer=tokenizer, data_size=3).samples] == ["one/0", "one/2", "two/0"]
    assert len(load(one, two, tokenizer=tokenizer, data_size=-1).samples) == 4


def test_long_prompts_are_filtered_and_counted(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", RLINF, RLINF | {"prompt": "x" * 11}, RLINF | {"prompt": "x" * 10})
    data = load(path, tokenizer=tokenizer, max_prompt_length=10)
    assert [s.id for s in data.samples] == ["a/0", "a/2"]
    assert (data.stats.rows, data.stats.kept, data.stats.too_long) == (3, 2, 1)
    assert "1 left out" in str(data.stats)


def test_long_prompts_are_an_error_if_not_filtered(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", RLINF, RLINF | {"prompt": "x" * 11})
    with pytest.raises(UserError, match=r"1 prompts are longer than 10 tokens \(the longest, a/1, has 11\)"):
        load(path, tokenizer=tokenizer, max_prompt_length=10, filter_by_length=False)


def test_no_row_left(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", RLINF)
    with pytest.raises(UserError, match=r"data.max_prompt_length = 2"):
        load(path, tokenizer=tokenizer, max_prompt_length=2)
    with pytest.raises(UserError, match=r"data.data_size: 0"):
        load(path, tokenizer=tokenizer, data_size=0)
    with pytest.raises(UserError, match="no data file"):
        load(tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Who?"}, "no gold answer; .*'solutions'"),
        ({"prompt": "Who?", "solutions": []}, "no gold answer"),
        ({"prompt": "Who?", "solutions": [None, " "]}, "no gold answer"),
        ({"prompt": "Who?", "solutions": {"target": []}}, "no gold answer"),
        ({"prompt": "", "solutions": ["Ann"]}, "prompt is empty"),
        ({"solutions": ["Ann"]}, "no prompt"),
        ({"prompt": "Who?", "solutions": "Ann", "reward_model": "exactmatch"}, "'exactmatch' is not known"),
        ('{"prompt": "\\ud83d", "solutions": "Ann"}', "surrogate"),
        ('{"prompt": "Who?", ', "not valid JSON"),
        ('["Who?"]', "expected an object"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, tokenizer, row, message):
    path = write_jsonl(tmp_path / "bad.jsonl", RLINF, "", row, RLINF)
    with pytest.raises(UserError, match=f"bad.jsonl:3: .*{message}"):
        load(path, tokenizer=tokenizer)


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path, tokenizer):
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist([RLINF, {"prompt": "Who?", "solutions": None}]), path)
    with pytest.raises(UserError, match=r"bad.parquet:2: the row has no gold answer"):
        load(path, tokenizer=tokenizer)


def test_broken_files(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"missing.jsonl: no such file"):
        load(tmp_path / "missing.jsonl", tokenizer=tokenizer)
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path, tokenizer=tokenizer)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(UserError, match=r"empty.jsonl: the file has no rows"):
        load(empty, tokenizer=tokenizer)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "Who?", "solutions": "Ann"}\n{"prompt": "Caf\xe9?", "solutions": "Ann"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl:2: not UTF-8"):
        load(latin, tokenizer=tokenizer)
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"torn.parquet: not readable as parquet"):
        load(torn, tokenizer=tokenizer)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"none.parquet: the file has no rows"):
        load(tmp_path / "none.parquet", tokenizer=tokenizer)


def test_a_byte_order_mark_and_line_separators_inside_texts_are_no_trouble(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(RLINF | {"prompt": "a\u2028b"}, ensure_ascii=False).encode() + b"\r\n")
    (sample,) = load(path, tokenizer=tokenizer).samples
    assert sample.question == "a\u2028b"


def test_a_tokenizer_that_knows_nothing_is_noticed(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(UserError, match="has no tokens"):
        load(write_jsonl(tmp_path / "a.jsonl", RLINF), tokenizer=nothing)
