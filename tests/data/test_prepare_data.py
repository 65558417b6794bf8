"""`searchr1 prepare-data` on small files in the public shapes: all seven sets, every row shape, every complaint."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.public_rows import flashrag_row, write_flashrag, write_jsonl

from searchr1.cli import main as searchr1
from searchr1.commands.prepare_data import EPILOG, _settings, main, parser
from searchr1.data.dataset import load_dataset_files
from searchr1.data.prepare import prepare as output
from searchr1.data.prepare.rows import ROW_SHAPES
from searchr1.data.prepare.sources import SETS
from searchr1.data.prompts import fill_template
from searchr1.data.templates import SEARCHR1, TEMPLATES
from searchr1.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPTS, DOCS = ROOT / "examples/searchr1/data_process", ROOT / "docs"
GOOD = {"id": "1", "question": "Who?", "golden_answers": ["Ann"]}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A copy of the hub's repository, four rows a file."""
    return write_flashrag(tmp_path_factory.mktemp("flashrag"))


def run(*words):
    assert main([str(word) for word in words]) == 0


def rows_of(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_all_seven_sets_and_what_search_r1_evaluates_on(hub, tmp_path, capsys):
    run("--local", hub, "--split", "train,test", "--out", tmp_path)
    train, test = rows_of(tmp_path / "train.parquet"), rows_of(tmp_path / "test.parquet")
    assert [row["data_source"] for row in train] == ["nq"] * 4 + ["hotpotqa"] * 4
    assert [row["data_source"] for row in test] == [name for name in SETS for _ in range(4)]
    stored = {row["data_source"]: row["id"].partition("_")[0] for row in test}
    assert stored == {
        "nq": "test", "triviaqa": "test", "popqa": "test", "bamboogle": "test",
        "hotpotqa": "dev", "2wikimultihopqa": "dev", "musique": "dev",
    }  # fmt: skip
    assert {row["extra_info"]["split"] for row in test} == {"test"}
    stats = json.loads((tmp_path / "stats.json").read_text())["splits"]
    assert sum(entry["written"] for entry in stats) == len(train) + len(test)
    assert next(entry for entry in stats if entry["set_name"] == "2wikimultihopqa")["yes_no"] == 1.0
    assert {entry["published_rows"] for entry in stats if entry["split"] == "test"} == {
        3610, 11313, 14267, 7405, 12576, 2417, 125,
    }  # fmt: skip
    told = capsys.readouterr().out
    assert "nq/train.jsonl has 4 rows; as published it has 79,168" in told
    assert re.search(r"train +hotpotqa +4 +0 +0 +0 +4", told)


def test_rows_are_search_r1s(hub, tmp_path):
    run("--local", hub, "--sets", "nq", "--out", tmp_path)
    question = "who founded the nq train company number 1?"
    answers = ["Founder 1", "F. 1"]
    assert rows_of(tmp_path / "train.parquet")[1] == {
        "id": "train_1",
        "question": question,
        "golden_answers": answers,
        "data_source": "nq",
        "prompt": [{"role": "user", "content": SEARCHR1.replace("{question}", question)}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": answers}},
        "extra_info": {"split": "train", "index": 1},
    }


def test_rlinfs_own_loader_reads_rlinf_rows(hub, tmp_path, tokenizer):
    from omegaconf import OmegaConf
    from rlinf.data.datasets.reasoning import ReasoningDataset

    run("--local", hub, "--rows", "rlinf", "--format", "jsonl", "--template", "cot", "--out", tmp_path)
    keys = {"prompt_key": "prompt", "answer_key": "solutions", "apply_chat_template": False}
    config = OmegaConf.create({"data": keys | {"max_prompt_length": 2000}})
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token_id = 0
    found = ReasoningDataset([str(tmp_path / "train.jsonl")], config, tokenizer)
    assert len(found) == 8
    prompt = fill_template("cot", "who founded the nq train company number 1?")
    assert found[1].prompt[-found[1].length :].tolist() == tokenizer.encode(prompt)
    assert found[1].answer == ["Founder 1", "F. 1"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("flags", ["", "--rows rlinf", "--rows rlinf --messages", "--rows plain"])
def test_training_loads_every_output(hub, tmp_path, tokenizer, kind, flags):
    run("--local", hub, "--split", "test", "--sets", "all", "--format", kind, "--out", tmp_path, *flags.split())
    template = "searchr1" if "plain" in flags else None
    loaded = load_dataset_files(
        [tmp_path / f"test.{kind}"], tokenizer=tokenizer, max_prompt_length=5000, template=template, apply_chat_template=True
    ).samples
    assert len({sample.id for sample in loaded}) == len(loaded) == 28
    assert {sample.data_source for sample in loaded} == set(SETS)
    assert loaded[0].question == "who founded the nq test company number 0?"
    assert loaded[0].golden_answers == ["Founder 0", "F. 0"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": fill_template("searchr1", loaded[0].question)}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert loaded[0].prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_both_formats_hold_the_same(hub, tmp_path):
    run("--local", hub, "--format", "both", "--template", "asearcher", "--out", tmp_path)
    assert rows_of(tmp_path / "train.parquet") == rows_of(tmp_path / "train.jsonl")
    assert "<access> url </access>" in rows_of(tmp_path / "train.jsonl")[0]["prompt"][0]["content"]


def test_a_prompt_rendered_with_a_models_chat_template(hub, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    run("--local", hub, "--rows", "rlinf", "--chat-template", tmp_path / "model", "--template", "direct", "--out", tmp_path)
    (first, *_) = rows_of(tmp_path / "train.parquet")
    assert first["prompt"] == f"<user>{fill_template('direct', first['question'])}</user><assistant>"


def test_own_files_join_public_sets_and_take_their_place(hub, tmp_path):
    (tmp_path / "mine.csv").write_text("Question,Answer\nwho is it,Ann\n")
    nq = write_jsonl(tmp_path / "own-nq.jsonl", [flashrag_row("nq", "train", 9)])
    inputs = ["--input", f"mine={tmp_path}/mine.csv", "--input", f"nq:train={nq}"]
    run("--local", hub, "--sets", "nq,hotpotqa", *inputs, "--out", tmp_path / "out", "--limit", 2)
    found = [(row["data_source"], row["id"]) for row in rows_of(tmp_path / "out/train.parquet")]
    assert found == [("nq", "train_9"), ("hotpotqa", "train_0"), ("hotpotqa", "train_1"), ("mine", "train_0")]
    run(*inputs[:2], "--out", tmp_path / "alone", "--no-question-mark", "--rows", "plain")
    assert rows_of(tmp_path / "alone/train.parquet") == [
        {"id": "train_0", "data_source": "mine", "question": "who is it", "golden_answers": ["Ann"]}
    ]


def test_a_seed_mixes_the_sets_and_draws_the_rows(hub, tmp_path):
    order = {}
    for seed in (1, 1, 2):
        out = tmp_path / str(len(order))
        run("--local", hub, "--seed", seed, "--limit", 3, "--out", out)
        rows = rows_of(out / "train.parquet")
        order.setdefault(seed, []).append([(row["data_source"], row["extra_info"]["index"]) for row in rows])
    assert order[1][0] == order[1][1] != order[2][0]
    sources = [source for source, _ in order[1][0]]
    assert sorted(sources) == ["hotpotqa"] * 3 + ["nq"] * 3
    assert sources != sorted(sources)
    assert sources != sorted(sources, reverse=True)


def test_all_bad_rows_are_named_and_nothing_is_written(tmp_path):
    rows = [GOOD, "{", {"id": "2", "question": " ", "golden_answers": ["x"]}, GOOD, {"question": "When?"}]
    first = write_jsonl(tmp_path / "a.jsonl", rows)
    second = write_jsonl(tmp_path / "b.jsonl", [{"question": "Who?", "golden_answers": ["\ud800"]}])
    words = ["--input", f"a={first}", "--input", f"b={second}", "--out", tmp_path / "out"]
    with pytest.raises(UserError) as caught:
        run(*words)
    told = str(caught.value)
    assert told.startswith("5 bad rows:")
    for line in (
        f"{first}:2: not valid JSON",
        f"{first}:3: the question is empty",
        f"{first}:4: the id '1' is that of line 1 too",
        f"{first}:5: the row has no gold answer",
        f"{second}:1: half of a surrogate pair",
    ):
        assert line in told
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no row is left"):
        run("--input", f"b={second}", "--out", tmp_path / "out", "--skip-bad")
    run(*words[:2], *words[4:], "--skip-bad")
    assert [row["id"] for row in rows_of(tmp_path / "out/train.parquet")] == ["1"]
    (stats,) = json.loads((tmp_path / "out/stats.json").read_text())["splits"]
    assert (stats["read"], stats["bad"], stats["written"]) == (5, 4, 1)


def test_many_bad_rows_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{}] * 30)
    with pytest.raises(UserError, match="30 bad rows") as caught:
        run("--input", f"a={path}", "--out", tmp_path / "out")
    assert str(caught.value).count("no question") == 20
    assert "and 10 more" in str(caught.value)


def asked(*questions):
    return [{"question": question, "answer": f"{number}"} for number, question in enumerate(questions)]


def test_duplicates_are_reported_and_left_out_on_request(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", asked("Who is it?", "When?", "who IS it", "Where?"))
    run("--input", f"a={path}", "--out", tmp_path)
    assert "1 questions are asked before, 1 of them with other gold answers (kept; --dedup" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "train.parquet")) == 4
    run("--input", f"a={path}", "--out", tmp_path, "--dedup")
    assert [row["extra_info"]["index"] for row in rows_of(tmp_path / "train.parquet")] == [0, 1, 3]


def test_training_questions_that_evaluation_asks(tmp_path, capsys):
    train = write_jsonl(tmp_path / "train.jsonl", asked("Who is it?", "When?", "Where?"))
    test = write_jsonl(tmp_path / "test.jsonl", asked("who is it", "Why?"))
    both = ["--split", "train,test", "--input", f"a:train={train}", "--input", f"a:test={test}", "--out", tmp_path / "o"]
    run(*both)
    told = "1 training questions are asked in evaluation too (a in a 1); kept"
    assert told in capsys.readouterr().out
    assert len(rows_of(tmp_path / "o/train.parquet")) == 3
    run(*both, "--drop-overlap")
    assert [row["question"] for row in rows_of(tmp_path / "o/train.parquet")] == ["When?", "Where?"]
    assert len(rows_of(tmp_path / "o/test.parquet")) == 2
    capsys.readouterr()
    # In two runs, the second one looks at what the first has written.
    run("--input", f"a={train}", "--out", tmp_path / "o")
    assert told in capsys.readouterr().out
    run("--split", "test", "--input", f"a={test}", "--out", tmp_path / "o")
    assert "1 test questions are trained on too; to leave them out of train" in capsys.readouterr().out
    run("--input", f"a={train}", "--against", test, "--drop-overlap", "--out", tmp_path / "p")
    assert len(rows_of(tmp_path / "p/train.parquet")) == 2


def test_statistics_of_a_split_that_was_prepared_before_stay(hub, tmp_path):
    run("--local", hub, "--out", tmp_path)
    run("--local", hub, "--split", "test", "--out", tmp_path)
    run("--local", hub, "--sets", "nq", "--out", tmp_path)
    entries = json.loads((tmp_path / "stats.json").read_text())["splits"]
    assert [(entry["split"], entry["set_name"]) for entry in entries] == [
        *(("test", name) for name in SETS),
        ("train", "nq"),
    ]


def test_an_interrupted_run_leaves_the_earlier_files(hub, tmp_path, monkeypatch):
    run("--local", hub, "--limit", 1, "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stopped(rows, total, tell):
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "BATCH_ROWS", 1)
    monkeypatch.setattr("searchr1.data.prepare.prepare._counted", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("--local", hub, "--out", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_row_keeps_its_own_reward_where_there_is_a_place_for_it(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD | {"reward_model": "f1_score"}, GOOD | {"id": "2"}])
    run("--input", f"a={path}", "--rows", "plain", "--out", tmp_path)
    assert [row["reward_model"] for row in rows_of(tmp_path / "train.parquet")] == ["f1_score", None]
    run("--input", f"a={path}", "--out", tmp_path)
    assert "1 rows name a reward of their own" in capsys.readouterr().out


MISTAKES = [
    ("--sets nqq", r"--sets nqq: is not known; use nq, triviaqa"),
    ("--sets popqa", "popqa: has no train split, only test; sets with one: nq, triviaqa"),
    ("--sets nq --split tset", "--split tset: is not known"),
    ("--sets ,", "--sets: names nothing"),
    ("--input mine", r"expected NAME=FILE"),
    ("--input mine:all=x.jsonl", "expected NAME=FILE"),
    ("--input mine={hub}/gone.jsonl", "no such file"),
    ("--input mine={hub}/nq", "no such file"),
    ("--input mine={hub}/nq/train.jsonl --split train,test", "which split is it"),
    ("--input mine:test={hub}/nq/train.jsonl", "test is not asked for"),
    ("--input a={hub}/nq/train.jsonl --input a={hub}/nq/dev.jsonl", "names two files"),
    ("--input a:train={hub}/nq/train.jsonl --split train,test", "--split test: no file is given"),
    ("--local {hub}/nq", "has no nq/train.jsonl; it must be laid out like"),
    ("--local {hub}/nq --split test --sets musique", "has no musique/dev.jsonl"),
    ("--local {hub}/gone", "no such folder"),
    ("--local {hub} --template serachr1", "--template: 'serachr1' is not known"),
    ("--local {hub} --template none", "--rows plain for bare questions"),
    ("--local {hub} --template rag", "nq/train_0 has none; name a retrieval server"),
    ("--local {hub} --rows plain --template cot", "plain rows hold no prompt"),
    ("--local {hub} --search h:1", "shows no passages"),
    ("--local {hub} --messages", "is for --rows rlinf"),
    ("--local {hub} --rows rlinf --messages --chat-template x", "exclude each other"),
    ("--local {hub} --rows rlinf --chat-template {hub}", "its tokenizer cannot be loaded"),
    ("--local {hub} --limit 0", "--limit: must be 1 or more"),
    ("--local {hub} --against {hub}/gone", "no such file"),
    ("--local {hub} --out {hub}/nq/train.jsonl", "is a file"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_are_reported(hub, tmp_path, flags, message):
    words = flags.format(hub=hub).split()
    with pytest.raises(UserError, match=message):
        run(*words, *([] if "--out" in words else ["--out", tmp_path]))


def test_the_page_lists_the_sets_templates_and_row_shapes():
    page = (DOCS / "guides/data.md").read_text(encoding="utf-8")
    for found in SETS.values():
        cells = []
        for split in ("train", "dev", "test"):
            count = f"{found.splits.get(split, 0):,}"
            cells.append("" if split not in found.splits else f"**{count}**" if split == found.evaluation_split else count)
        assert re.sub(" +", " ", f"| `{found.name}` | {' | '.join(cells)} |") in page
    for name in (*(known for known in TEMPLATES if known != "none"), *ROW_SHAPES):
        assert f"| `{name}` |" in page


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.relative_to(DOCS)))
def test_commands_on_the_pages_are_understood(page):
    text = page.read_text(encoding="utf-8") + (EPILOG if page.name == "data.md" else "")
    for words in re.findall(r"^\s*searchr1 prepare-data (.*?)(?:   .*|\s#.*)?$", text, re.MULTILINE):
        settings = _settings(parser().parse_args(words.replace("$DATA", "data").split()))
        assert settings.out.parts[0] == "data"


def test_the_command_is_known_and_reports_mistakes_without_a_traceback(tmp_path, capsys):
    assert searchr1(["prepare-data", "--sets", "popqa", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("searchr1 prepare-data: --sets popqa")


def test_the_scripts_that_search_r1s_users_know(hub, tmp_path):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    sets = shutil.copytree(hub, tmp_path / "sets")
    with (sets / "nq/train.jsonl").open("a") as train:
        train.write(json.dumps(flashrag_row("nq", "test", 0) | {"id": "also_in_test"}) + "\n")
    words = ["bash", SCRIPTS / "data_process.sh", "--local", sets, "--drop-overlap"]
    result = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "data/nq_hotpotqa_train"
    assert len(rows_of(out / "train.parquet")) == 8  # the ninth is a question of the evaluation
    assert len(rows_of(out / "test.parquet")) == 28


@pytest.mark.parametrize(("name", "sign"), [("nq", "what you know"), ("nq_search", "<search>"), ("nq_rag", "Doc 1")])
def test_the_scripts_for_nq_alone(hub, tmp_path, monkeypatch, name, sign):
    import runpy

    folder = hub
    if name == "nq_rag":  # rows that bring their passages need no server
        folder = tmp_path / "hub"
        for split in ("train", "test"):
            write_jsonl(folder / f"nq/{split}.jsonl", [flashrag_row("nq", split, 0) | {"passages": "Doc 1"}])
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", [name, "--local_dir", str(tmp_path / "out"), "--local", str(folder)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    for split in ("train", "test"):
        assert sign in rows_of(tmp_path / f"out/{split}.parquet")[0]["prompt"][0]["content"]
