from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from searchr1.agent.trajectory import Sample, Turn
from searchr1.cli import main as searchr1
from searchr1.commands.report import main
from searchr1.errors import UserError
from searchr1.evaluation.summary import validation_metrics
from searchr1.report.page import REPORT, report_page
from searchr1.report.run_files import COLUMNS
from searchr1.tracking.loggers import JsonlLogger
from searchr1.tracking.metrics import step_metrics
from searchr1.tracking.trajectory_log import eval_file, remove_later, train_file, write_trajectories
from searchr1.ui.page import escape

HOSTILE = (
    "</pre></details><script>alert(1)</script><img src=x onerror=alert(2)><a href='javascript:alert(3)'>\"'&lt;"
    "<style>*{display:none}</style><!-- ]]> \x00\x1b[31m \u202e \ud83d </title></html> {{script}} \u2028"
)


class Reader(HTMLParser):
    """Collects a page's elements: {id or tag: text}."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.name = ""
        self.texts: dict[str, str] = {}
        self.policy = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        given = dict(attrs)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        if tag not in ("meta", "input"):
            self.open.append(tag)
            self.name = given.get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"
        self.name = ""

    def handle_data(self, data: str) -> None:
        self.texts[self.name] = self.texts.get(self.name, "") + data

    def overview(self) -> dict[str, Any]:
        return dict(json.loads(self.texts["overview"]))

    def unpacked(self, name: str) -> Any:
        return json.loads(gzip.decompress(base64.b64decode(self.texts[name])))

    def rows(self) -> list[dict[str, Any]]:
        """Every trajectory of the page: its columns, its file and its body."""
        bodies = [body for name in self.texts if name.startswith("chunk-") for body in self.unpacked(name)]
        files = self.overview()["files"]
        index = self.unpacked("index")
        assert index["columns"] == list(COLUMNS)
        return [
            dict(zip(COLUMNS, row[1:], strict=True)) | {"file": files[row[0]]["key"], "body": body}
            for row, body in zip(index["rows"], bodies, strict=True)
        ]


def page(*runs: Path, **choices: Any) -> str:
    return "".join(report_page(runs, **choices))


@pytest.fixture
def run(tmp_path: Path, make_trajectory: Any) -> Path:
    """A run of four steps with evaluations before and after."""
    folder = tmp_path / "my run"
    folder.mkdir()
    remove_later(folder, 0)
    log = JsonlLogger(folder / "metrics.jsonl", 0)
    for step in range(5):
        rows = [make_trajectory(i, source=("one_hop", "two_hop")[i % 2], right=i < 5 * step) for i in range(30)]
        if step in (0, 4):
            write_trajectories(eval_file(folder, step), rows)
            log.log(step, validation_metrics(rows))
        if step:
            rows = [make_trajectory(i, rollout_id) for i in range(6) for rollout_id in range(5)]
            write_trajectories(train_file(folder, step), rows)
            seconds = {"time/rollout": 3.0, "time/train": 1.5, "time/step": 5.0, "actor/kl": 0.01, "actor/entropy": 0.4}
            log.log(step, step_metrics(rows) | seconds | {"mismatch/logprob_gap_max": 1e-6, "actor/grad_norm": float("nan")})
    log.close()
    return folder


def test_the_page_is_whole_and_its_policy_allows_nothing_but_its_own_script_and_style(run):
    text = page(run)
    seen = Reader(text)
    assert not seen.open
    assert not seen.attributes & {"src", "href", "style", "action", "srcdoc"}
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    policy = dict(part.strip().split(" ", 1) for part in seen.policy.split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        digest = hashlib.sha256(seen.texts[tag].encode()).digest()
        assert policy[name] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert "connect-src" not in policy


def test_the_script_builds_with_text_alone():
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser", REPORT.script
    )
    for ending in ("</script", "</style", "<!--"):
        assert ending not in (REPORT.script + REPORT.style).lower()


def test_the_page_describes_the_run(run):
    overview = Reader(page(run)).overview()
    assert overview["title"] == "my run"
    assert overview["subtitle"] == "4 training steps, 2 evaluations"
    titles = {chart["title"] for chart in overview["charts"]}
    assert titles >= {
        "Reward",
        "Exact match",
        "Searches per question",
        "Response length",
        "Entropy",
        "KL to the reference model",
        "Mismatch of engine and actor",
        "Where a step's time goes",
        "Held-out exact match by data source",
    }
    assert "Gradient norm" not in titles, "all its values are null"
    assert overview["tiles"][0] == ["Held-out exact match", "0 → 0.667"]
    (summary,) = overview["summaries"]
    assert summary["headline"] == "The model got better at the held-out questions."


def test_the_summary_has_an_example_that_leads_to_both_rollouts(run, make_trajectory):
    searching = make_trajectory(
        1,
        source="two_hop",
        turns=[Turn("<search>a</search>", "search", 1, ["a"]), Turn("<search>b</search>", "search", 1, ["b"])],
    )
    write_trajectories(eval_file(run, 4), [make_trajectory(0), searching])
    example = Reader(page(run)).overview()["summaries"][0]["example"]
    before, after = example["attempts"]
    assert example["question"] == "Who?"
    assert (before["step"], before["right"], before["queries"]) == (0, False, ["who"])
    assert (after["step"], after["right"], after["queries"]) == (4, True, ["a", "b"])
    assert after["key"] == "0/eval/4/0/two_hop/1"


def test_every_trajectory_is_in_the_page(run):
    rows = Reader(page(run)).rows()
    assert len(rows) == 2 * 30 + 4 * 30
    assert {row["file"] for row in rows} == {"0-eval-0", "0-eval-4", *(f"0-train-{step}" for step in range(1, 5))}
    assert rows[0]["question"] == "Who?"
    assert rows[0]["body"]["turns"][0]["queries"] == ["who"]
    assert Reader(page(run)).overview()["leftOut"] == ""


def test_a_limit_keeps_the_same_questions_of_every_evaluation_and_whole_groups(run):
    seen = Reader(page(run, trajectories=60))
    rows = seen.rows()
    assert len(rows) <= 60
    assert seen.overview()["leftOut"].startswith(f"{len(rows)} of 180 logged trajectories are in this page")
    before, after = ([row["id"] for row in rows if row["file"] == f"0-eval-{step}"] for step in (0, 4))
    assert before == after
    assert len(before) == 15
    for step in range(1, 5):
        ids = [row["id"] for row in rows if row["file"] == f"0-train-{step}"]
        assert ids
        assert all(ids.count(one) == 5 for one in ids)
    assert Reader(page(run, trajectories=0)).rows() == []


def test_hostile_text_cannot_leave_its_place(run, make_trajectory):
    bad = make_trajectory(
        sample=Sample(HOSTILE, 0, [1], HOSTILE, [HOSTILE], HOSTILE),
        turns=[
            Turn(HOSTILE, "search", 1, [HOSTILE], HOSTILE, 1, 0.1, HOSTILE),
            Turn(f"<answer>{HOSTILE}</answer>", "answer", 1),
        ],
        reward_parts={HOSTILE: 1.0, "exact_match": 1.0},
    )
    write_trajectories(train_file(run, 4), [bad])
    write_trajectories(eval_file(run, 0), [make_trajectory(sample=bad.sample, right=False)])
    write_trajectories(eval_file(run, 4), [bad])
    with (run / "metrics.jsonl").open("a") as file:
        metrics = validation_metrics([make_trajectory(source=HOSTILE)])
        file.write(json.dumps({"step": 5, HOSTILE: 1.0, **metrics}) + "\n")
    clean, text = Reader(page(run.parent / "my run")), page(run.rename(run.parent / "<img src=x onerror=alert(1)>"))
    seen = Reader(text)
    text.encode()
    assert seen.attributes == clean.attributes
    assert not seen.open
    assert [tag for tag in seen.tags if tag != "script"] == [tag for tag in clean.tags if tag != "script"]
    assert text.count("<style>") == 1
    assert not re.search("[\x00-\x08\x1b\u2028\u202e\ud800-\udfff]", text)
    overview = seen.overview()
    assert HOSTILE in [cells[0] for cells in overview["table"]]
    row = next(row for row in seen.rows() if row["file"] == "0-train-4")
    assert row["question"] == row["source"] == HOSTILE
    assert row["body"]["turns"][0]["tool_error"] == HOSTILE
    assert seen.texts["title"] == "<img src=x onerror=alert(1)>"


def test_escape():
    assert escape("<a href=\"x\" on='y'>&") == "&lt;a href=&quot;x&quot; on=&#x27;y&#x27;&gt;&amp;"
    assert escape("a\tb\r\nc") == "a\tb\r\nc"
    assert escape("\x07\ud800\u202e") == "\ufffd" * 3
    assert escape(None) == "None"


def test_an_evaluation_alone_with_and_without_metrics(tmp_path, make_trajectory):
    rows = [make_trajectory(i) for i in range(3)]
    remove_later(tmp_path, 0)
    write_trajectories(eval_file(tmp_path, 0), rows)
    bare = Reader(page(tmp_path))
    assert len(bare.rows()) == 3
    assert bare.overview()["summaries"][0]["headline"] == "100% of 3 questions are answered exactly right."
    # Of a question that was asked again the last rollout counts.
    write_trajectories(eval_file(tmp_path, 0), [make_trajectory(0, right=False), *rows])
    again = Reader(page(tmp_path))
    assert again.overview()["summaries"][0]["headline"] == "100% of 3 questions are answered exactly right."
    write_trajectories(eval_file(tmp_path, 0), rows)
    log = JsonlLogger(tmp_path / "metrics.jsonl", 0)
    log.log(0, validation_metrics(rows))
    seen = Reader(page(tmp_path))
    assert seen.overview()["summaries"][0]["headline"] == "100% of 3 questions are answered exactly right."
    assert len(seen.rows()) == 3


def test_a_running_run_without_evaluation_or_trajectories(tmp_path, make_trajectory):
    log = JsonlLogger(tmp_path / "metrics.jsonl", 0)
    log.log(1, step_metrics([make_trajectory()]))
    overview = Reader(page(tmp_path)).overview()
    assert overview["table"] == []
    assert overview["files"] == []
    assert overview["charts"]


def test_runs_are_compared(run, tmp_path, make_trajectory):
    other = tmp_path / "deep" / "my run"
    (other / "trajectories").mkdir(parents=True)
    write_trajectories(eval_file(other, 2), [make_trajectory(0)])
    JsonlLogger(other / "metrics.jsonl", 0).log(2, validation_metrics([make_trajectory(0)]))
    seen = Reader(page(run, other))
    overview = seen.overview()
    assert overview["compares"]
    assert overview["runs"] == [f"{tmp_path.name}/my run", "deep/my run"]
    assert [summary["run"] for summary in overview["summaries"]] == overview["runs"]
    assert [line[0] for line in overview["table"]] == ["run", *overview["runs"]]
    assert "1-eval-2" in {row["file"] for row in seen.rows()}


def test_a_folder_of_runs_stands_for_the_runs_in_it(tmp_path, make_trajectory):
    for method in ("search", "direct"):
        (tmp_path / "eval" / method / "trajectories").mkdir(parents=True)
        write_trajectories(eval_file(tmp_path / "eval" / method, 0), [make_trajectory(0)])
    (tmp_path / "eval" / "notes").mkdir()
    assert Reader(page(tmp_path / "eval")).overview()["runs"] == ["direct", "search"]


def test_the_command_writes_the_page(run, tmp_path, capsys):
    assert searchr1(["report", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert (run / "report.html").read_text(encoding="utf-8") == page(run)
    assert main([str(run), "--output", str(tmp_path / "other.html"), "--trajectories", "10"]) == 0
    assert len(Reader((tmp_path / "other.html").read_text(encoding="utf-8")).rows()) <= 10


def test_mistakes_are_reported(run, tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl is missing"):
        main([str(tmp_path / "nowhere")])
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no metrics yet"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="--trajectories -1"):
        main([str(run), "--trajectories", "-1"])
    with pytest.raises(UserError, match="not writable"):
        main([str(run), "--output", str(tmp_path / "no" / "folder.html")])
    train_file(run, 1).write_text("{torn\n")
    with pytest.raises(UserError, match=r"step_1.jsonl:1: not valid JSON"):
        main([str(run)])
