from __future__ import annotations

import re

import pytest

from searchr1.config.schema import Config
from searchr1.evaluation.summary import validation_metrics
from searchr1.tracking.loggers import read_metrics
from searchr1.tracking.metrics import step_metrics
from searchr1.tracking.run_log import RunLog
from searchr1.tracking.trajectory_log import logged_steps


@pytest.fixture
def config() -> Config:
    made = Config()
    made.runner.logger.logger_backends = []
    return made


def test_a_step_is_one_plain_line_when_nobody_looks(tmp_path, capsys, config, make_trajectory):
    metrics = step_metrics([make_trajectory()]) | {
        "actor/kl": 0.0123,
        "actor/entropy": 0.5,
        "mismatch/logprob_gap_max": 2e-5,
        "time/rollout": 4.0,
        "time/reward": 0.1,
        "time/logprob": 0.0,
        "time/train": 3.0,
        "time/weight_update": 0.2,
    }
    with RunLog(tmp_path, config, first_step=0, total_steps=3) as log:
        log.step(1, [make_trajectory()], metrics)
    printed = capsys.readouterr().out
    (line,) = printed.splitlines()
    for part in ("step 1/3", "reward 1.000", "em 1.000", "searches 1.00", "length 10", "kl 0.0123", "entropy 0.500"):
        assert part in line
    assert "seconds 4.0/0.1/0.0/3.0/0.2 (rollout/reward/logprob/train/update)" in line
    assert re.search(r"mismatch 2e-05 .* left \d+\.\d min", line)
    assert "\x1b" not in printed


def test_everything_is_recorded(tmp_path, capsys, config, make_trajectory):
    rows = [make_trajectory(i, source=source, right=i == 0) for i in range(2) for source in ("one_hop", "[bold]two[/]")]
    with RunLog(tmp_path, config, first_step=0, total_steps=2) as log:
        log.evaluation(0, rows, validation_metrics(rows))
        log.step(1, rows, step_metrics(rows))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
    assert logged_steps(tmp_path, "step_") == [1]
    assert logged_steps(tmp_path, "eval_step_") == [0]
    printed = capsys.readouterr().out
    assert "evaluation at step 0" in printed
    assert re.search(r"\[bold\]two\[/\]\s+2\s+0\.500", printed)
    assert re.search(r"all\s+4\s+0\.500", printed)


def test_a_second_run_in_the_folder_leaves_nothing_of_the_first(tmp_path, config, make_trajectory):
    for steps in (3, 1):
        with RunLog(tmp_path, config, first_step=0, total_steps=steps) as log:
            for step in range(1, steps + 1):
                log.step(step, [make_trajectory()], step_metrics([make_trajectory()]))
    assert logged_steps(tmp_path, "step_") == [1]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_resumed_run_goes_on(tmp_path, config, make_trajectory):
    for first, last in ((0, 3), (2, 4)):
        with RunLog(tmp_path, config, first_step=first, total_steps=4) as log:
            for step in range(first + 1, last + 1):
                log.step(step, [make_trajectory()], step_metrics([make_trajectory()]))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert logged_steps(tmp_path, "step_") == [1, 2, 3, 4]
