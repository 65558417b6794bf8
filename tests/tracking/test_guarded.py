from __future__ import annotations

import json
import sys
import types
from typing import Any

import pytest

from searchr1.config.schema import Config
from searchr1.errors import UserError
from searchr1.tracking.loggers import FAILED, GuardedLogger, hosted_loggers, read_metrics, start_loggers
from searchr1.tracking.run_log import RunLog


class Breaks:
    """A service whose network is gone at some steps."""

    name = "wandb"

    def __init__(self, *steps: int, error: type[BaseException] = ConnectionError) -> None:
        self.steps, self.error = steps, error
        self.rows: list[int] = []
        self.closed = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step in self.steps:
            raise self.error("network\n  is down")
        self.rows.append(step)

    def close(self) -> None:
        self.closed = True


def test_a_service_that_fails_ends_no_training(tmp_path, capsys, make_trajectory):
    config = Config()
    config.runner.logger.logger_backends = []
    bad, good = Breaks(2, 3), Breaks()
    with RunLog(tmp_path, config, [bad, good], first_step=0, total_steps=4) as log:
        for step in (1, 2, 3, 4):
            log.step(step, [make_trajectory()], {"a": 1.0})
    assert (bad.rows, good.rows) == ([1, 4], [1, 2, 3, 4])
    assert bad.closed
    assert good.closed
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row.get(FAILED) for row in rows] == [None, None, 1.0, 2.0]
    errors = capsys.readouterr().err
    assert errors.count("warning: wandb failed at step 2 (ConnectionError: network is down); the run goes on") == 1
    assert "logger/failed: wandb did not take 2 of 4 rows; metrics.jsonl has all of them" in errors
    assert errors.count("\n") == 2


@pytest.mark.parametrize("error", [OSError, SystemExit, RuntimeError])
def test_whatever_a_service_raises(error, capsys):
    logger = GuardedLogger(Breaks(1, error=error))
    logger.log(1, {})
    assert logger.failed == 1
    assert f"({error.__name__}: network is down)" in capsys.readouterr().err


def test_a_stop_by_the_user_is_no_failure_of_a_service():
    with pytest.raises(KeyboardInterrupt):
        GuardedLogger(Breaks(1, error=KeyboardInterrupt)).log(1, {})


def test_event_files_on_a_full_disk_end_no_training(tmp_path, monkeypatch, make_trajectory):
    from searchr1.tracking import loggers

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    config = Config()
    config.runner.logger.logger_backends = ["tensorboard"]
    monkeypatch.setattr(loggers.TensorBoardLogger, "log", full)
    with RunLog(tmp_path, config, first_step=0, total_steps=1) as log:
        log.step(1, [make_trajectory()], {"a": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("error", [RuntimeError("bad\n key"), SystemExit("bad key")])
def test_a_service_that_does_not_start_is_one_sentence(tmp_path, monkeypatch, error):
    def refuses(**_: Any) -> None:
        raise error

    module = types.ModuleType("wandb")
    module.init = refuses  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = Config()
    config.runner.logger.logger_backends = ["wandb"]
    with pytest.raises(UserError, match=r"^runner\.logger\.logger_backends: a service did not start \(\w+: bad key\)"):
        start_loggers(lambda: hosted_loggers(tmp_path, config.runner, {}, 0))


def test_an_evaluations_results_are_written_before_a_service_can_fail(tmp_path, monkeypatch, capsys):
    from searchr1.evaluation import evaluate
    from searchr1.evaluation.results import Results

    order: list[str] = []
    task = types.SimpleNamespace(
        ledger=types.SimpleNamespace(close=lambda: None),
        method=types.SimpleNamespace(name="search"),
        folder=tmp_path,
        settings=None,
    )
    results = Results("m", None, {"search": types.SimpleNamespace(summary={})}, {})  # type: ignore[dict-item]

    def fails(*_: Any, **__: Any) -> list[Any]:
        order.append("service")
        raise ConnectionError("no network")

    for name, stand_in in {
        "check_before_start": lambda *_, **__: None,
        "with_judge": lambda config: config,
        "without_adapters": lambda config: config,
        "load_questions": lambda config: types.SimpleNamespace(described="none"),
        "evaluation_path": lambda config: tmp_path,
        "require_logins": lambda backends: order.append("logins"),
        "open_tasks": lambda *_: [task],
        "sampling_note": lambda *_: "greedy",
        "answer_pending": lambda *_: order.append("answers"),
        "summarise_tasks": lambda *_: results,
        "flat_metrics": lambda summary: {"val/a": 1.0},
        "write_results": lambda *_: order.append("results"),
        "hosted_loggers": fails,
    }.items():
        monkeypatch.setattr(evaluate, name, stand_in)
    config = Config()
    config.runner.output_dir, config.runner.experiment_name = str(tmp_path), "run"
    config.runner.logger.logger_backends = []
    config.cluster.device = "cpu"
    assert evaluate.evaluate(config) == (results, tmp_path)
    assert order == ["logins", "answers", "results", "service"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "val/a": 1.0}
    assert "ConnectionError: no network" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_key_is_looked_for_before_anything_starts(tmp_path, monkeypatch, command):
    from searchr1.evaluation import evaluate
    from searchr1.training import run, train

    module = {"train": run, "evaluate": evaluate}[command]
    stand_ins: dict[str, Any] = {
        "load_data": lambda config: types.SimpleNamespace(train=[], val=[]),
        "PromptLoader": lambda *_, **__: types.SimpleNamespace(total_steps=1),
        "check_before_start": lambda *_, **__: None,
        "with_judge": lambda config: config,
        "without_adapters": lambda config: config,
        "load_questions": lambda config: types.SimpleNamespace(described="none"),
        "training_cluster": lambda *_: pytest.fail("nothing starts"),
        "evaluation_cluster": lambda *_: pytest.fail("nothing starts"),
        "open_tasks": lambda *_: pytest.fail("nothing starts"),
        "require_backends": lambda backends: None,
    }
    for name, stand_in in stand_ins.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    config = Config()
    config.runner.output_dir, config.runner.experiment_name = str(tmp_path / "out"), "run"
    config.runner.logger.logger_backends = ["wandb"]
    config.cluster.device = "cpu"
    with pytest.raises(UserError, match="wandb is not logged in"):
        (train.train if command == "train" else evaluate.evaluate)(config)
    assert not (tmp_path / "out").exists()
