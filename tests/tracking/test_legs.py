"""Where a run's settings changed: read from what it recorded, and shown by report and watch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from searchr1.config.load import save_config
from searchr1.config.schema import Config
from searchr1.errors import UserError
from searchr1.report.follow import WatchedRun
from searchr1.report.page import report_page
from searchr1.report.watch import WatchedRuns
from searchr1.tracking.legs import legs_of, settings_changes
from searchr1.tracking.loggers import JsonlLogger

HOSTILE = "</script><script>alert(1)</script>\u2028"


def write_leg(run: Path, first_step: int, **actor: object) -> None:
    config = Config()
    config.actor.optim.lr = float(str(actor.get("lr", 1e-6)))
    config.agentloop.invalid_action_message = str(actor.get("message", "invalid"))
    config.runner.max_steps = first_step + 10  # changed by every leg, without effect on what is learned
    (run / "configs").mkdir(parents=True, exist_ok=True)
    save_config(config, run / f"configs/step_{first_step}.yaml")


def make_run(run: Path, *first_steps: int) -> Path:
    for number, first_step in enumerate(first_steps):
        write_leg(run, first_step, lr=(number + 1) * 1e-6)
    run.mkdir(exist_ok=True)
    log = JsonlLogger(run / "metrics.jsonl", 0)
    for step in range(1, 13):
        log.log(step, {"reward/mean": 0.1 * step})
    log.close()
    return run


def overview_of_report(*runs: Path) -> dict[str, object]:
    text = "".join(report_page(runs))
    start = text.index('id="overview">') + len('id="overview">')
    return dict(json.loads(text[start : text.index("</script>", start)]))


LR_AT_11 = {"run": "", "step": 11, "settings": ["actor.optim.lr: 2e-06 -> 3e-06"]}


def test_the_legs_are_in_order_of_their_numbers(tmp_path):
    run = make_run(tmp_path / "run", 1, 5, 11)
    (run / "configs/notes.yaml").write_text("a: 1")
    assert [leg.first_step for leg in legs_of(run)] == [1, 5, 11]
    assert [(c.step, [str(d) for d in c.settings]) for c in settings_changes(run)] == [
        (5, ["actor.optim.lr: 1e-06 -> 2e-06"]),
        (11, ["actor.optim.lr: 2e-06 -> 3e-06"]),
    ]


def test_report_and_watch_show_where_settings_changed(tmp_path):
    run = make_run(tmp_path / "run", 1, 5, 11)
    shown = overview_of_report(run)["changes"]
    assert shown == [{"run": "", "step": 5, "settings": ["actor.optim.lr: 1e-06 -> 2e-06"]}, LR_AT_11]
    assert WatchedRuns([run]).overview()["changes"] == shown
    other = make_run(tmp_path / "other", 1, 3)
    compared = overview_of_report(run, other)["changes"]
    assert [(change["run"], change["step"]) for change in compared] == [("run", 5), ("run", 11), ("other", 3)]


@pytest.mark.parametrize("legs", [(), (1,)])
def test_runs_without_a_change_or_without_a_record_are_shown_as_before(tmp_path, legs):
    run = make_run(tmp_path / "run", *legs)
    save_config(Config(), run / "config.yaml")
    assert overview_of_report(run)["changes"] == []
    assert WatchedRuns([run]).overview()["changes"] == []
    assert WatchedRuns([run]).overview()["problem"] == ""


def test_watch_sees_a_resume_with_other_settings(tmp_path):
    run = make_run(tmp_path / "run", 1)
    watched = WatchedRuns([run])
    before = watched.overview()
    write_leg(run, 7, lr=5e-6)
    after = watched.overview()
    assert after["changes"] == [{"run": "", "step": 7, "settings": ["actor.optim.lr: 1e-06 -> 5e-06"]}]
    assert after["version"] != before["version"]


def test_a_damaged_record_is_an_error_of_the_report_and_a_notice_of_watch(tmp_path):
    run = make_run(tmp_path / "run", 1, 5)
    (run / "configs/step_5.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"step_5\.yaml: not readable"):
        overview_of_report(run)
    followed = WatchedRun(run, "run")
    followed.refresh()
    assert "step_5.yaml: not readable" in followed.problem
    assert followed.view().changes == []


def test_text_in_settings_cannot_become_markup(tmp_path):
    run = make_run(tmp_path / "run", 1)
    write_leg(run, 4, message=HOSTILE)
    text = "".join(report_page([run]))
    assert "alert(1)</script>" not in text
    (change,) = overview_of_report(run)["changes"]  # type: ignore[misc, attr-defined]
    assert "</script>" in change["settings"][0]
