from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from searchr1.agent.trajectory import Sample, Turn
from searchr1.cli import main as searchr1
from searchr1.errors import UserError
from searchr1.tracking.loggers import JsonlLogger
from searchr1.tracking.metrics import eval_metrics, step_metrics
from searchr1.tracking.report import escape, main, page
from searchr1.tracking.trajectory_log import eval_file, remove_later, train_file, write_trajectories

HOSTILE = (
    "</pre></details><script>alert(1)</script><img src=x onerror=alert(2)><a href='javascript:alert(3)'>\"'&lt;"
    "<style>*{display:none}</style><!-- ]]> \x00\x1b[31m \u202e \ud83d </title></html>"
)
ALLOWED = set(
    "html head meta title style body main h1 h2 p div span b small details summary pre table tr th td "
    "figure figcaption svg line text polyline polygon circle".split()
)
ALLOWED_ATTRIBUTES = set(
    "lang charset name content http-equiv class id role aria-label viewbox points x y x1 x2 y1 y2 cx cy r "
    "text-anchor".split()
)


class Reader(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path, make_trajectory: Any) -> Path:
    """A run of four steps with evaluations before and after."""
    folder = tmp_path / "my run"
    folder.mkdir()
    remove_later(folder, 0)
    log = JsonlLogger(folder / "metrics.jsonl", 0)
    for step in range(5):
        rows = [make_trajectory(i, source=("one_hop", "two_hop")[i % 2], right=i < step) for i in range(30)]
        if step in (0, 4):
            write_trajectories(eval_file(folder, step), rows)
            log.log(step, eval_metrics(rows))
        if step:
            write_trajectories(train_file(folder, step), rows)
            seconds = {"time/rollout": 3.0, "time/train": 1.5, "time/step": 5.0, "actor/kl": 0.01, "actor/entropy": 0.4}
            log.log(step, step_metrics(rows) | seconds | {"mismatch/logprob_gap_max": 1e-6, "actor/grad_norm": float("nan")})
    log.close()
    return folder


def test_the_page_is_whole_and_asks_for_nothing_from_outside(run):
    text = page(run)
    seen = Reader(text)
    assert not seen.open
    assert seen.tags <= ALLOWED
    assert seen.attributes <= ALLOWED_ATTRIBUTES
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text


def test_the_page_tells_the_run(run):
    seen = Reader(page(run)).text
    for part in (
        "my run",
        "4 steps",
        "Reward",
        "Exact match",
        "Searches per question",
        "Response length",
        "KL to the reference",
    ):
        assert part in seen
    for part in (
        "Entropy",
        "Mismatch of engine and actor",
        "Where a step's time goes",
        "Held-out exact match by data source",
    ):
        assert part in seen
    assert "Gradient norm" not in seen, "all its values are null"
    assert "0 → 0.133" in seen


def test_the_table_compares_before_and_after(run):
    (table,) = re.findall(r"<table>(.*?)</table>", page(run))
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table.split("</tr>")]
    assert rows[0][:4] == ["data source", "questions", "exact match, step 0", "exact match, step 4"]
    assert rows[1][:4] == ["one_hop", "15", "0", "0.133"]
    assert rows[2][:4] == ["two_hop", "15", "0", "0.133"]
    assert rows[3][:4] == ["all", "30", "0", "0.133"]


def test_trajectories_of_first_and_last_step_are_shown(run):
    text = page(run, samples=7)
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[2:] == [
        "Held-out questions, step 0",
        "Held-out questions, step 4",
        "Training questions, step 1",
        "Training questions, step 4",
    ]
    assert text.count("<details") == 4 * 7
    seen = Reader(text).text
    assert "<search>who</search>" in seen
    assert "<information>Ann</information>" in seen
    assert text.count("<details") > text.count('class="good"') > 0
    assert page(run).count("<details") == 4 * 20


def test_hostile_text_is_shown_and_does_nothing(run, make_trajectory):
    bad = make_trajectory(
        sample=Sample(HOSTILE, 0, [1], HOSTILE, [HOSTILE], HOSTILE),
        turns=[
            Turn(HOSTILE, "search", 1, [HOSTILE], HOSTILE, 1, 0.1, HOSTILE),
            Turn(f"<answer>{HOSTILE}</answer>", "answer", 1),
        ],
        reward_parts={HOSTILE: 1.0},
    )
    write_trajectories(train_file(run, 4), [bad])
    with (run / "metrics.jsonl").open("a") as file:
        metrics = eval_metrics([make_trajectory(source=HOSTILE)])
        file.write(json.dumps({"step": 5, **metrics}) + "\n")
    text = page(run)
    text.encode()
    seen = Reader(text)
    assert seen.tags <= ALLOWED
    assert seen.attributes <= ALLOWED_ATTRIBUTES
    assert not seen.open
    assert "<script>alert(1)</script>" in seen.text
    assert text.count("<style>") == 1
    assert not re.search("[\x00-\x08\x1b\u202e\ud800-\udfff]", text)


def test_a_run_folder_with_a_hostile_name(run):
    worse = run.rename(run.parent / "<img src=x onerror=alert(1)>")
    seen = Reader(page(worse))
    assert seen.tags <= ALLOWED
    assert "onerror" not in seen.attributes


def test_escape():
    assert escape("<a href=\"x\" on='y'>&") == "&lt;a href=&quot;x&quot; on=&#x27;y&#x27;&gt;&amp;"
    assert escape("a\tb\r\nc") == "a\tb\r\nc"
    assert escape("\x07\ud800\u202e") == "\ufffd" * 3
    assert escape(None) == "None"


def test_an_evaluation_alone_has_a_table_and_trajectories(tmp_path, make_trajectory):
    rows = [make_trajectory(i) for i in range(3)]
    remove_later(tmp_path, 0)
    log = JsonlLogger(tmp_path / "metrics.jsonl", 0)
    log.log(0, eval_metrics(rows))
    write_trajectories(eval_file(tmp_path, 0), rows)
    text = page(tmp_path)
    assert "exact match, step 0" in text
    assert text.count("<details") == 3


def test_a_running_run_without_evaluation_or_trajectories(tmp_path, make_trajectory):
    log = JsonlLogger(tmp_path / "metrics.jsonl", 0)
    log.log(1, step_metrics([make_trajectory()]))
    text = page(tmp_path)
    assert "No evaluation was logged." in text
    assert "<svg" in text


def test_the_command_writes_the_page(run, tmp_path, capsys):
    assert searchr1(["report", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert (run / "report.html").read_text(encoding="utf-8") == page(run)
    assert main([str(run), "--output", str(tmp_path / "other.html"), "--samples", "1"]) == 0
    assert (tmp_path / "other.html").read_text(encoding="utf-8").count("<details") == 4


def test_mistakes_are_told(run, tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl is missing"):
        main([str(tmp_path / "nowhere")])
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no metrics yet"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="--samples -1"):
        main([str(run), "--samples", "-1"])
    with pytest.raises(UserError, match="not writable"):
        main([str(run), "--output", str(tmp_path / "no" / "folder.html")])
    train_file(run, 1).write_text("{torn\n")
    with pytest.raises(UserError, match=r"step_1.jsonl:1: not valid JSON"):
        main([str(run)])
