"""A run whose learning rate is a hundred times too high: noticed, stopped, and put right as its message says."""

from __future__ import annotations

import re

import pytest
from training_runs import as_after

from searchr1.actor.checkpoint import checkpoint_steps
from searchr1.tracking.loggers import read_metrics

NORMAL = 1e-4
COMMON = (
    "runner.experiment_name=explodes", "runner.val_check_interval=-1", "runner.val_before_train=False",
    "runner.save_interval=1", "runner.keep_checkpoints=null", "runner.health.patience=3",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_exploding_run_is_stopped_and_goes_on_from_the_checkpoint_it_names(demo, restarted, address):
    folder = demo.path / "explodes"
    as_after(2, restarted, folder)

    # The warm-up is over, so the third step's update is as wild as it gets.
    wild = ("runner.resume_dir=auto", f"actor.optim.lr={100 * NORMAL}", "runner.max_steps=30")
    exploded = demo.train(address, *wild, *COMMON, timeout=500)
    assert exploded.returncode == 2, exploded.stdout[-3000:]
    message = exploded.stdout[exploded.stdout.rindex("searchr1 train:") :]
    assert "Traceback" not in message
    found = re.search(r"steps (\d+) to (\d+) were unhealthy", message)
    assert found, message
    first, last = map(int, found.groups())
    assert (first, last) == (4, 6)
    warnings = re.findall(
        r"step (\d+) is unhealthy \((\d) in a row\): \S+ .* runner\.health\.\w+=\S+; helps: ", exploded.stdout
    )
    assert {(int(step), int(count)) for step, count in warnings} == {(4, 1), (5, 2), (6, 3)}
    assert "step 4 is unhealthy: its checkpoint is left out" in exploded.stdout
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "reward/mean" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6], "metrics were lost"
    assert rows[-1]["actor/lr"] == pytest.approx(100 * NORMAL)
    # Step 3's update made the weights that step 4 failed with.
    assert checkpoint_steps(folder / "checkpoints") == [1, 2]
    assert (folder / "checkpoints/suspect_step_3").is_dir()

    [line] = [line for line in message.splitlines() if line.startswith("  runner.resume_dir=")]
    resume, rate = line.split()
    assert resume == f"runner.resume_dir={folder}/checkpoints/global_step_2"
    assert rate == f"actor.optim.lr={50 * NORMAL:g}"
    healed = demo.train(address, resume, f"actor.optim.lr={NORMAL}", "runner.max_steps=5", *COMMON)
    assert healed.returncode == 0, healed.stdout[-3000:]
    assert "unhealthy" not in healed.stdout
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "reward/mean" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["actor/lr"] == pytest.approx(NORMAL)
    assert rows[-1]["reward/mean"] > 0
    assert checkpoint_steps(folder / "checkpoints") == [1, 2, 3, 4, 5]
