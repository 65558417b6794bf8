"""Gold answers of every type are read as meant, or rejected by their column's name; none is made by `str()`."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from support.question_rows import load, write_jsonl

from searchr1.data.golds import read_golds
from searchr1.errors import UserError

CASES = Path(__file__).parents[3] / "shared/cases/questions"
NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "golds"),
    [
        ("Ann", ["Ann"]),
        (["Ann", "Anna"], ["Ann", "Anna"]),
        (1998, ["1998"]),
        (1998.0, ["1998"]),
        (2.5, ["2.5"]),
        (1e22, ["10000000000000000000000"]),
        (1e-7, ["0.0000001"]),
        (Decimal("3.10"), ["3.1"]),
        ([1, "one"], ["1", "one"]),
        ("['Ann', 'Anna']", ["Ann", "Anna"]),
        ('["Ann", "Anna"]', ["Ann", "Anna"]),
        ("('Ann', 'Anna')", ["Ann", "Anna"]),
        ("['it\\'s', \"Ann's\"]", ["it's", "Ann's"]),
        ("['Ann', None]", ["Ann"]),
        ({"target": ["Ann"], "aliases": ["A"]}, ["Ann"]),
        ({"ground_truth": {"target": ["Ann"]}}, ["Ann"]),
        ('{"target": ["Ann", "Anna"]}', ["Ann", "Anna"]),
        ("{'target': ['Ann']}", ["Ann"]),
        ({"value": "Ann", "aliases": ["Ann", "Anna"], "type": "x"}, ["Ann", "Ann", "Anna"]),
        ({"text": ["Ann"], "answer_start": [3]}, ["Ann"]),
        # Texts that only begin like a list.
        ("[REC]", ["[REC]"]),
        ("[1, 2]", ["[1, 2]"]),
        ('"Heroes"', ['"Heroes"']),
        ("{x | x > 0}", ["{x | x > 0}"]),
        ("nan", ["nan"]),
        ("None", ["None"]),
        ("true", ["true"]),
    ],
)
def test_values_that_are_read(value, golds):
    assert read_golds({"solutions": value}).texts == golds


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "truth value"),
        (float("inf"), "holds inf"),
        (b"Ann", "bytes"),
        (date(1998, 1, 2), "date"),
        ([["Ann"], ["Bob"]], "list inside a list"),
        (["['Ann', 'Anna']"], "list inside a list"),
        ([{"name": "Ann"}], "type dict"),
        ([True], "truth value"),
        ({"name": "Ann"}, "object with the keys name"),
        ('{"name": "Ann"}', "object with the keys name"),
        ("['Ann' 'Anna']", "looks like a list"),
        ("['Ann', nan, 'x']", "looks like a list"),
        ("array(['Ann', 'Anna'], dtype=object)", "looks like a list"),
    ],
)
def test_values_that_are_rejected_by_name(tmp_path, tokenizer, value, message):
    with pytest.raises(UserError, match=f"^solutions: .*{message}"):
        read_golds({"solutions": value})


@pytest.mark.parametrize("value", [None, NAN, "", " ", [], [None], [NAN, ""], {}, {"target": []}, {"target": None}, "[]"])
def test_missing_values_are_no_golds_and_leave_the_word_to_another_column(value):
    assert read_golds({"solutions": value}) is None
    assert read_golds({"solutions": value, "answer": "Ann"}).texts == ["Ann"]


@pytest.mark.parametrize(
    "row",
    [
        {"reward_model": {"style": "rule", "ground_truth": {"target": ["Ann"]}}},  # Search-R1, verl
        {"reward_model": '{"style": "rule", "ground_truth": {"target": ["Ann"]}}'},  # the same in a column of text
        {"reward_spec": {"method": "rule", "ground_truth": {"target": ["Ann"]}}},  # SkyRL
        {"reward_spec": {"method": "rule", "ground_truth": "Ann"}},
        {"golden_answers": ["Ann"]},  # FlashRAG, agent-lightning
        {"answer": "Ann"},  # HotpotQA, TRL
        {"solution": "Ann"},  # TRL
        {"label": "Ann"},  # slime
        {"label": {"ground_truth": {"target": ["Ann"]}}},
        {"ground_truth": ["Ann"]},
    ],
)
def test_the_shapes_of_other_systems(tmp_path, tokenizer, row):
    path = write_jsonl(tmp_path / "rows.jsonl", {"prompt": "Who?"} | row)
    (sample,) = load(path, tokenizer=tokenizer).samples
    assert sample.golden_answers == ["Ann"]
    assert sample.reward_name is None


def test_what_is_left_out_or_contradicted_is_seen(tmp_path, tokenizer):
    rows = [{"prompt": "Who?", "solutions": [None, "x"]}, {"prompt": "Who?", "solutions": "a", "answer": "b"}]
    data = load(write_jsonl(tmp_path / "a.jsonl", *rows), tokenizer=tokenizer)
    assert [sample.golden_answers for sample in data.samples] == [["x"], ["a"]]
    left_out, contradicted = data.warnings
    assert left_out.startswith("1 rows have null, NaN or blank items among the gold answers in solutions")
    assert contradicted.startswith("1 rows have other gold answers in answer than in solutions")
    assert left_out.endswith(f"(the first: {tmp_path}/a.jsonl:1)")


def test_an_unknown_shape_is_reported_with_its_columns(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "Who?", "reply": "Ann"})
    with pytest.raises(UserError, match=r"a\.jsonl:1: .* its columns are prompt, reply; .* data\.answer_key"):
        load(path, tokenizer=tokenizer)
    path = write_jsonl(tmp_path / "b.jsonl", {"instruction": "Who?", "answer": "Ann"})
    with pytest.raises(UserError, match=r"its columns are instruction, answer; .* data\.prompt_key"):
        load(path, tokenizer=tokenizer)


@pytest.mark.skipif(not CASES.is_dir(), reason="the reported inputs lie beside the repository")
class TestReportedInputs:
    def test_lists_written_as_text(self, tokenizer):
        found = [sample.golden_answers for sample in load(CASES / "list_as_text.jsonl", tokenizer=tokenizer).samples]
        assert found == [["Tisttek Shipyard", "Tisttek"]] * 2

    def test_nan(self, tokenizer):
        with pytest.raises(UserError, match=r"nan_answer\.jsonl:1: .*solutions is NaN"):
            load(CASES / "nan_answer.jsonl", tokenizer=tokenizer)

    def test_other_rows_and_files(self, tokenizer):
        def golds(name):
            return [s.golden_answers for s in load(CASES / name, tokenizer=tokenizer, template="demo").samples]

        assert golds("agl.jsonl") == golds("semicolon.csv") == [["Tisttek Shipyard"]]
        assert golds("arr.json") == [["x"], ["x"]]
        assert len(golds("searchr1_np.parquet")) == 50
        with pytest.raises(UserError, match=r"latin1\.csv:2: not UTF-8"):
            golds("latin1.csv")
        with pytest.raises(UserError, match=r"empty_q\.jsonl:1"):
            golds("empty_q.jsonl")

    def test_ids_that_repeat(self, tokenizer):
        data = load(CASES / "collide.parquet", tokenizer=tokenizer)
        assert [s.id for s in data.samples] == ["nq/0", "nq/1", "nq/2", "nq/0#2", "nq/1#2", "nq/2#2"]
        assert data.samples[3].golden_answers == ["Gendia March"]
        assert any("have the id of an earlier row" in warning for warning in data.warnings)
