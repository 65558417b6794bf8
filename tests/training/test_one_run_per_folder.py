"""A second `train`, `eval`, `sft` or `demo` in a folder that is in use is refused before it reads or writes there."""

from __future__ import annotations

from pathlib import Path

import pytest

from searchr1.commands import sft
from searchr1.commands.demo import main as demo_command
from searchr1.commands.report import main as report
from searchr1.config.load import load_config
from searchr1.config.schema import Config
from searchr1.demo import demo
from searchr1.errors import UserError
from searchr1.evaluation import evaluate
from searchr1.files.folder_lock import NAME, folder_lock
from searchr1.tracking.run_path import run_path
from searchr1.training import run, train

TINY = Path(__file__).parents[2] / "examples/searchr1/config/tiny-cpu.yaml"
WAYS = {"fresh": (), "overwrite": ("runner.overwrite=True",), "auto": ("runner.resume_dir=auto",)}


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("a run that is refused goes no further")

    for module, name in ((run, "load_data"), (evaluate, "load_questions"), (sft, "train"), (demo, "run_command")):
        monkeypatch.setattr(module, name, reached)


def config_in(folder: Path, *overrides: str) -> Config:
    return load_config(TINY, [f"runner.output_dir={folder}", "runner.experiment_name=run", *overrides])


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", [train.train, evaluate.evaluate], ids=["train", "eval"])
@pytest.mark.parametrize("way", WAYS)
def test_a_second_run_is_rejected_however_it_is_asked_for(tmp_path, command, way):
    config = config_in(tmp_path, *WAYS[way])
    folder = run_path(config)
    with folder_lock(folder, "key", "searchr1 train"):
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
        (folder / "checkpoints/global_step_1").mkdir(parents=True)
        before = everything(folder)
        with pytest.raises(UserError, match=rf"runner\.experiment_name: {folder} is in use by searchr1 train on .* process"):
            command(config)
        assert everything(folder) == before
        assert report([str(folder), "--output", str(tmp_path / "page.html")]) == 0  # who only reads needs no lock
    assert not (folder / NAME).exists()
    with pytest.raises(AssertionError, match="goes no further"):
        command(config)
    assert not (folder / NAME).exists()  # nor is it left behind by one that fails


def test_a_run_that_fails_before_it_writes_leaves_no_folder(tmp_path):
    with pytest.raises(AssertionError, match="goes no further"):
        train.train(config_in(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


def test_fine_tuning_and_the_demo_too(tmp_path):
    with folder_lock(tmp_path / "out", "key", "searchr1 sft"):
        words = ["--model", "m", "--data", "d", "--output", str(tmp_path / "out")]
        with pytest.raises(UserError, match=r"--output: .*out is in use by searchr1 sft on"):
            sft.main(words)
        with pytest.raises(UserError, match=r"--out: .*out is in use by searchr1 sft on"):
            demo_command(["--out", str(tmp_path / "out"), "cluster.device=cpu"])


def test_only_the_first_process_of_a_fine_tuning_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "train", lambda args: [])
    words = ["--model", "m", "--data", "d", "--output", str(tmp_path / "out")]
    with folder_lock(tmp_path / "out", "key", "searchr1 sft"):
        monkeypatch.setenv("RANK", "1")
        assert sft.main(words) == 0
    monkeypatch.setenv("RANK", "0")
    assert sft.main(words) == 0


def test_a_fine_tuning_that_ended_meanwhile_is_not_written_over(tmp_path, monkeypatch):
    args = sft.parse(["--model", "m", "--data", "d", "--output", str(tmp_path / "out")])
    monkeypatch.setattr(sft, "parse", lambda argv: args)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out/model.safetensors").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        sft.main([])
