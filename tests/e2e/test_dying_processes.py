"""A whole run whose processes are killed: noticed within seconds, nothing left, and gone on with."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from support.training_runs import NO_EVAL, wait_for_step

from searchr1.cluster.processes import identify, is_running, stat_of, title

pytestmark = [
    pytest.mark.slow,  # each starts Ray and vLLM, half a minute and more
    pytest.mark.timeout(600),
]
ENDLESS = ("runner.save_interval=1", "runner.max_steps=500", *NO_EVAL)
LEFT_AFTER_SECONDS = 15


def descendants(root):
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := stat_of(int(entry))):
            children.setdefault(stat.parent, []).append(int(entry))
    found, waiting = [], [root]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            found.append(pid)
            waiting.append(pid)
    return [process for process in map(identify, found) if process is not None]


def weights():
    return set(Path("/dev/shm").glob("searchr1-weights-*"))


@pytest.fixture
def run(demo, address, request):
    """A run with a checkpoint, the processes under its driver, and weights that were in shared memory before it."""
    before = weights()
    name = re.sub(r"\W+", "-", request.node.name)
    process = demo.start(address, f"runner.experiment_name={name}", *ENDLESS)
    try:
        wait_for_step(demo.path / name / "metrics.jsonl", 2, process)
        yield process, descendants(process.pid), before
    finally:
        process.kill()
        process.communicate()


def require_nothing_left(processes, before):
    deadline = time.monotonic() + LEFT_AFTER_SECONDS
    folders = weights() - before
    while left := [title(p.pid) for p in processes if is_running(p)] + sorted(map(str, folders)):
        assert time.monotonic() < deadline, left
        folders &= weights()  # another run on this machine may have some for a moment
        time.sleep(0.1)


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_cleanly(run, kind, code):
    if signal.getsignal(kind) == signal.SIG_IGN:
        pytest.skip(f"whoever runs the tests has had {kind.name} ignored, which the run keeps")
    process, processes, before = run
    process.send_signal(kind)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output[-3000:]
    message = output.splitlines()[-1]
    assert re.fullmatch(
        rf"searchr1 train: stopped by {kind.name} after step \d+ \(last checkpoint: step \d+\); go on with "
        r"runner\.resume_dir=auto",
        message,
    ), output[-3000:]
    assert "Traceback" not in output
    assert "***" not in output, "Ray's own handler prints a stack as after a crash"
    require_nothing_left(processes, before)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r"^ray::RolloutWorker", "rank 0 of RolloutGroup"),
        (r"^ray::ChannelWorker", "the channel between the groups"),
        (r"/gcs_server ", "Ray's GCS"),
    ],
)
def test_a_process_that_is_killed_ends_the_run_with_one_sentence(run, pattern, name):
    process, processes, before = run
    victim = next(p for p in processes if re.search(pattern, title(p.pid)))
    killed = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed < LEFT_AFTER_SECONDS
    assert process.returncode == 1, output[-3000:]
    (message,) = re.findall(r"^searchr1 train: .*", output, re.MULTILINE)
    assert message.startswith(f"searchr1 train: {name} (process {victim.pid}) ")
    assert message.endswith("; go on with runner.resume_dir=auto")
    assert "Traceback" not in output
    require_nothing_left(processes, before)


def test_a_driver_that_is_killed_leaves_nothing(run):
    process, processes, before = run
    process.kill()
    require_nothing_left(processes, before)
