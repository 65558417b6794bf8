"""`searchr1 demo`: which steps follow each other, with commands that only leave their files behind."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from searchr1.runner import demo


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Fake sub-commands; `train` makes checkpoint number `steps`."""

    def command(name, *arguments, env=None):
        words = [str(argument) for argument in arguments]
        out = Path(env["SEARCHR1_DEMO_DIR"]) if env else tmp_path
        if name == "train":
            step = next(word.partition("=")[2] for word in words if word.startswith("runner.max_steps="))
            (out / f"train/checkpoints/global_step_{step}/actor").mkdir(parents=True)
            row = {"step": int(step), "val/exact_match": 0.5, "val/searches": 1.0}
            (out / "train/metrics.jsonl").write_text(json.dumps(row) + "\n")
        elif name == "convert":
            model = Path(words[words.index("--output") + 1])
            model.mkdir()  # as the command itself, fails if it exists
            (model / "from").write_text(words[words.index("--checkpoint") + 1])
        elif name == "eval":
            (out / "eval").mkdir(exist_ok=True)
            (out / "eval/eval.json").write_text(json.dumps({"val/exact_match": 0.5, "val/searches": 1.0}))

    @contextmanager
    def retrieval_server(world, log):
        yield "127.0.0.1:1"

    monkeypatch.setattr(demo, "command", command)
    monkeypatch.setattr(demo, "retrieval_server", retrieval_server)


@pytest.mark.usefixtures("commands")
def test_a_demo_that_goes_on_converts_its_newest_checkpoint(tmp_path, capsys):
    for steps in (2, 40):
        assert demo.main(["--out", str(tmp_path), "--steps", str(steps)]) == 0
        assert (tmp_path / "model/from").read_text() == str(tmp_path / f"train/checkpoints/global_step_{steps}/actor")
    assert f"page    {tmp_path}/train/report.html" in capsys.readouterr().out
