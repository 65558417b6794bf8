from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1.config.schema import LoggerConfig, RunnerConfig
from searchr1.errors import UserError
from searchr1.tracking.loggers import (
    JsonlLogger,
    TensorBoardLogger,
    file_loggers,
    hosted_loggers,
    read_metrics,
    require_backends,
)


def log_steps(path: Path, first: int, last: int, value: float) -> None:
    logger = JsonlLogger(path, first)
    for step in range(first + 1, last + 1):
        logger.log(step, {"a": value})
        logger.log(step, {"val/a": value})
    logger.close()


def test_every_row_is_readable_as_soon_as_it_is_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path, 0)
    logger.log(1, {"a": 0.5, "b": float("nan"), "c": float("inf")})
    assert read_metrics(path) == [{"step": 1, "a": 0.5, "b": None, "c": None}]
    logger.close()


@settings(max_examples=25)
@given(stopped=st.integers(0, 6), resumed=st.integers(0, 6), cut=st.integers(0, 40))
def test_a_resumed_run_leaves_no_step_out_and_logs_none_twice(tmp_path_factory, stopped, resumed, cut):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    resumed = min(resumed, stopped)
    log_steps(path, 0, stopped, 1.0)
    if stopped > resumed:
        # A kill can cut the last row anywhere; it is always one after the checkpoint.
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - min(cut, len(data.splitlines()[-1]) + 1)])
    log_steps(path, resumed, 8, 2.0)
    expected = [(step, 1.0 if step <= resumed else 2.0) for step in range(1, 9)]
    rows = read_metrics(path)
    assert [(row["step"], row["a"]) for row in rows if "a" in row] == expected
    assert [(row["step"], row["val/a"]) for row in rows if "val/a" in row] == expected


def test_the_evaluation_before_the_first_step_survives_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path, 0)
    logger.log(0, {"val/a": 1.0})
    logger.log(1, {"a": 1.0})
    logger.close()
    log_steps(path, 1, 1, 0.0)
    assert [row["step"] for row in read_metrics(path)] == [0, 1]


def test_a_killed_process_keeps_what_it_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys, time; from pathlib import Path; from searchr1.tracking.loggers import JsonlLogger\n"
        "log = JsonlLogger(Path(sys.argv[1]), 0)\n"
        "for step in range(1, 6): log.log(step, {'a': 1.0})\n"
        "print('logged', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "logged\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"a": 1}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: "):
        read_metrics(path)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(UserError, match="not readable"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, value in ((0, 4, 1.0), (2, 5, 2.0)):
        logger = TensorBoardLogger(tmp_path, first)
        for step in range(first + 1, last + 1):
            logger.log(step, {"reward/mean": value})
        logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_unknown_and_missing_backends_are_reported_by_name(monkeypatch):
    with pytest.raises(UserError, match=r"logger_backends: unknown 'tensorbord'; use any of tensorboard, wandb, swanlab"):
        require_backends(["tensorboard", "tensorbord"])
    for name, extra in (("wandb", "wandb"), ("swanlab", "swanlab"), ("torch.utils.tensorboard", "train")):
        monkeypatch.setitem(sys.modules, name, None)
        backend = name.rpartition(".")[2]
        with pytest.raises(UserError, match=rf"{backend} is not installed; pip install 'searchr1\[{extra}\]'"):
            require_backends([backend])


def hosted_runner(backend):
    return RunnerConfig(experiment_name="n", logger=LoggerConfig(logger_backends=["tensorboard", backend], project_name="p"))


@pytest.mark.parametrize("backend", ["wandb", "swanlab"])
def test_hosted_backends_get_every_step_and_resume_under_one_id(tmp_path, monkeypatch, backend):
    calls: list[tuple[str, Any]] = []
    module = types.ModuleType(backend)
    module.init = lambda **given: calls.append(("init", given))  # type: ignore[attr-defined]
    module.log = lambda metrics, step: calls.append(("log", (step, metrics)))  # type: ignore[attr-defined]
    module.finish = lambda: calls.append(("finish", None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, backend, module)
    for first in (0, 1, 0):
        for logger in hosted_loggers(tmp_path, hosted_runner(backend), {"k": 1}, first):
            for step in (1, 2):
                logger.log(first + step, {"a": 1.0})
            logger.close()
    assert [name for name, _ in calls] == ["init", "log", "log", "finish"] * 3
    assert calls[1] == ("log", (1, {"a": 1.0}))
    fresh, resumed, overwritten = (given for name, given in calls if name == "init")
    assert fresh["project"] == "p"
    assert fresh["name"] == "n"
    assert fresh["config"] == {"k": 1}
    assert resumed["id"] == fresh["id"] != overwritten["id"]


def test_a_service_that_rejects_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    def refuses(**_):
        raise RuntimeError("no key")

    module = types.ModuleType("wandb")
    module.init = refuses  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(RuntimeError, match="no key"):
        hosted_loggers(tmp_path, hosted_runner("wandb"), {}, 0)
    assert not list(tmp_path.iterdir())


def test_metrics_file_is_always_written(tmp_path):
    (logger,) = file_loggers(tmp_path, [], first_step=0)
    logger.log(1, {"a": 1.0})
    logger.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": 1.0}


@pytest.mark.parametrize("value", ["1e999", "NaN", "-Infinity", "1" + "0" * 400])
def test_a_number_beyond_every_float_counts_as_absent(tmp_path, value):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "reward/mean": {value}, "rollout/searches": 2.5}}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "reward/mean": None, "rollout/searches": 2.5}]
