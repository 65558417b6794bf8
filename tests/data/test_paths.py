"""Data sets of the hub where a path stands, and names for files that have the same."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from support.question_rows import RLINF, load, write_jsonl

from searchr1.data.paths import DataFile, HubId, parse_hub_id, path_problem, source_names
from searchr1.data.prepare.hub import split_files
from searchr1.errors import UserError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("PeterJinGo/nq_hotpotqa_train", HubId("PeterJinGo/nq_hotpotqa_train", None, None, None)),
        ("owner/name:test", HubId("owner/name", None, "test", None)),
        ("owner/name@v1:test", HubId("owner/name", "v1", "test", None)),
        ("owner/name/sub/file.parquet", HubId("owner/name", None, None, "sub/file.parquet")),
        ("hf://datasets/owner/name@main/file.jsonl", HubId("owner/name", "main", None, "file.jsonl")),
        ("/owner/name", None),
        ("./owner/name", None),
        ("~/name", None),
        ("train.jsonl", None),
        ("owner/train.jsonl", None),
        ("tests/none/train.jsonl", None),  # a folder of that name is here
        ("owner/name/README", None),
        ("owner/name/../x.jsonl", None),
    ],
)
def test_hub_ids(monkeypatch, tmp_path, text, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert parse_hub_id(text) == found


def test_what_is_wrong_with_a_path(tmp_path):
    assert path_problem("owner/name:train") is None
    assert path_problem(str(write_jsonl(tmp_path / "a.jsonl", RLINF))) is None
    assert "does not exist; edit the path" in path_problem(str(tmp_path / "b.jsonl"))
    assert "is a folder" in path_problem(str(tmp_path))
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    assert "no known format" in path_problem(str(tmp_path / "a.xlsx"))


def test_files_of_the_same_name_are_different_sources(tmp_path, tokenizer):
    for folder in ("nq", "hotpotqa"):
        (tmp_path / folder).mkdir()
    paths = [write_jsonl(tmp_path / name, RLINF) for name in ("nq/train.jsonl", "hotpotqa/train.jsonl", "own.jsonl")]
    data = load(*paths, tokenizer=tokenizer)
    assert [sample.data_source for sample in data.samples] == ["nq/train", "hotpotqa/train", "own"]
    assert [sample.id for sample in data.samples] == ["nq/train/0", "hotpotqa/train/0", "own/0"]
    twice = load(paths[2], paths[2], tokenizer=tokenizer)
    assert [sample.id for sample in twice.samples] == ["own/0", "own/0#2"]
    assert len(twice.warnings) == 1


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/train.jsonl", "/a/test.jsonl"], ["train", "test"]),
        (["/a/train.jsonl.gz", "/b/train.parquet"], ["a/train", "b/train"]),
        (["/x/a/train.csv", "/y/a/train.csv"], ["x/a/train", "y/a/train"]),
        (["/a/train.jsonl", "/a/train.parquet"], ["train.jsonl", "train.parquet"]),
        (["/train.jsonl", "/a/train.jsonl"], ["train", "a/train"]),
    ],
)
def test_names(paths, names):
    assert source_names([DataFile(Path(path), PurePosixPath(path)) for path in paths]) == names


@pytest.mark.parametrize(
    ("names", "splits", "found"),
    [
        (["README.md", "train.parquet", "test.parquet"], ["train"], ["train.parquet"]),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
            ["train"],
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
        (["train/0.parquet", "train/1.parquet", "test/0.parquet"], ["train"], ["train/0.parquet", "train/1.parquet"]),
        (["dev.jsonl", "train.jsonl"], ["test", "validation"], ["dev.jsonl"]),
        (["all.jsonl", "dataset_infos.json"], ["train"], ["all.jsonl"]),
        (["nq_train.jsonl", "nq_test.jsonl"], ["test"], ["nq_test.jsonl"]),
        (["train.jsonl", "train_small.jsonl"], ["train"], ["train.jsonl"]),
    ],
)  # fmt: skip
def test_the_files_of_a_split(names, splits, found):
    assert split_files("o/n", names, splits, only=True) == found


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["README.md"], "no file of rows"),
        (["a.jsonl", "b.jsonl"], "no split train; its files are a.jsonl, b.jsonl"),
        (["nq/train.jsonl", "hotpotqa/train.jsonl"], "several files for train; .* o/n/hotpotqa/train.jsonl, o/n/nq/train"),
        (["train.jsonl", "train.parquet"], "several files"),
        (["data/train-00000-of-00002.parquet"], "only 1 of 2 parts"),
    ],
)
def test_data_sets_that_leave_it_open(names, message):
    with pytest.raises(UserError, match=message):
        split_files("o/n", names, ["train"], only=True)
