from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from searchr1.errors import UserError
from searchr1.files import folder_lock as module
from searchr1.files.checksums import take_all
from searchr1.files.folder_lock import NAME, FolderLock, Owner, folder_lock, is_lock

KEY = "runner.experiment_name"
HOLD = (
    "import sys, time; from pathlib import Path; from searchr1.files.folder_lock import folder_lock\n"
    "with folder_lock(Path(sys.argv[1]), 'key', 'searchr1 train'):\n"
    "    print('held', flush=True); time.sleep(60)"
)
RACE = """
import os, sys
from pathlib import Path
from searchr1.errors import UserError
from searchr1.files.folder_lock import FolderLock
folder, number = Path(sys.argv[1]), int(sys.argv[2])
start_r, start_w = os.pipe()
done_r, done_w = os.pipe()
result_r, result_w = os.pipe()
children = []
for _ in range(number):
    pid = os.fork()
    if pid == 0:
        os.close(start_w); os.close(done_w)
        os.read(start_r, 1)
        try:
            lock = FolderLock(folder, "key", "racer")
            os.write(result_w, b"w")
        except UserError as error:
            os.write(result_w, b"u" if "is in use by racer" in str(error) else b"?")
        os.read(done_r, 1)  # nobody ends before all have tried
        os._exit(0)
    children.append(pid)
os.close(start_w)
answers = b""
while len(answers) < number:
    answers += os.read(result_r, number)
os.close(done_w)
for pid in children:
    os.waitpid(pid, 0)
sys.stderr.write(answers.decode())
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has `tmp_path/run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait(30)


def take(folder: Path) -> None:
    with folder_lock(folder, KEY, "test"):
        pass


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def elsewhere(folder: Path, silent_s: float = 0.0, **changes: object) -> Path:
    """A lock of a process on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = {"command": "searchr1 train", "host": "node7", "process": 4711, "since": "2026-01-02 03:04:05 UTC"}
    owner |= {"boot": "another", "pid_namespace": 1, "process_started": 5, "nonce": "n"} | changes
    path = folder / NAME
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - silent_s,) * 2)
    return path


def test_a_second_process_is_rejected_and_learns_who_has_the_folder(tmp_path, holder):
    with pytest.raises(UserError) as caught:
        take(tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(f"{KEY}: {tmp_path / 'run'} is in use by searchr1 train on {os.uname().nodename}, ")
    assert f"process {holder.pid}, since 20" in message
    assert "wait for it to end, or give another one" in message
    assert listing(tmp_path / "run") == [NAME]


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, holder, capsys):
    holder.kill()
    holder.wait(30)
    started = time.monotonic()
    take(tmp_path / "run")
    assert time.monotonic() - started < 1
    assert f"taken over from searchr1 train on {os.uname().nodename}, process {holder.pid}" in capsys.readouterr().out
    assert listing(tmp_path / "run") == []  # nothing is left of either


def test_one_that_was_killed_and_not_yet_waited_for_is_dead_too(tmp_path, holder):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    take(tmp_path / "run")


def test_a_stopped_process_is_not_dead(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(module, "SILENCE_S", 0.0)
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        take(tmp_path / "run")


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path, holder):
    path = tmp_path / "run" / NAME
    owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | {"process": os.getpid(), "process_started": 1}))
    take(tmp_path / "run")


@pytest.mark.parametrize("dead_before", [0, 1, 3])
def test_of_fifty_processes_exactly_one_wins(tmp_path, dead_before):
    folder = tmp_path / "run"
    for _ in range(dead_before):  # each takes over from the one before, and dies
        subprocess.run([sys.executable, "-c", RACE, str(folder), "1"], check=True, capture_output=True)
    assert len(listing(folder)) == dead_before if dead_before else not folder.exists()
    run = subprocess.run([sys.executable, "-c", RACE, str(folder), "50"], check=True, capture_output=True, text=True)
    assert sorted(run.stderr) == ["u"] * 49 + ["w"]
    take(folder)
    assert listing(folder) == []


def test_processes_that_come_and_go_never_share_it(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from searchr1.errors import UserError\n"
        "from searchr1.files.folder_lock import folder_lock\n"
        "folder, end, had = Path(sys.argv[1]), time.monotonic() + 1.5, 0\n"
        "while time.monotonic() < end:\n"
        "    try:\n"
        "        with folder_lock(folder, 'key', 'racer') as lock:\n"
        "            os.close(os.open(folder / 'alone', os.O_CREAT | os.O_EXCL))\n"
        "            lock.require(); had += 1\n"
        "            os.unlink(folder / 'alone')\n"
        "            if had % 7 == 0:\n"
        "                pid = os.fork()\n"
        "                os.waitpid(pid, 0) if pid else os._exit(0)\n"
        "    except UserError as error:\n"
        "        assert 'in use' in str(error), error\n"
        "print(had)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a/b/run")]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        assert int(out.splitlines()[-1]) > 0
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_an_owner_on_another_machine_lives_as_long_as_it_gives_signs_of_life(tmp_path):
    elsewhere(tmp_path, silent_s=100)
    with pytest.raises(UserError, match=r"searchr1 train on node7, process 4711.*last sign of life 10\d s ago.*after 120 s"):
        take(tmp_path)
    elsewhere(tmp_path, silent_s=121)
    take(tmp_path)
    assert listing(tmp_path) == []


def test_silence_is_measured_with_the_file_systems_clock(tmp_path, monkeypatch):
    elsewhere(tmp_path, silent_s=10)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)  # this node's clock is an hour ahead
    with pytest.raises(UserError, match="last sign of life 1"):
        take(tmp_path)


def test_the_same_process_number_in_another_container_says_nothing(tmp_path):
    elsewhere(tmp_path, boot=module._boot(), pid_namespace=1, process=os.getpid(), process_started=1)
    with pytest.raises(UserError, match="last sign of life"):
        take(tmp_path)


def test_the_heartbeat_is_a_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    with folder_lock(tmp_path, KEY, "test"):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / NAME).stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / NAME).stat().st_mtime > time.time() - 60


def test_an_owner_that_was_taken_for_dead_learns_of_it_and_leaves_the_new_ones_lock_alone(tmp_path, monkeypatch):
    old = FolderLock(tmp_path, KEY, "old")
    old.require()
    monkeypatch.setattr(module, "_boot", lambda: "seen from another machine")
    monkeypatch.setattr(module, "SILENCE_S", -1.0)
    new = FolderLock(tmp_path, KEY, "new")
    monkeypatch.undo()
    with pytest.raises(UserError, match=rf"{KEY}: .* is taken over by new on "):
        old.require()
    old.release()
    new.require()
    new.release()
    assert listing(tmp_path) == []


def test_a_lock_that_was_removed_is_reported(tmp_path):
    with folder_lock(tmp_path, KEY, "test") as lock:
        (tmp_path / NAME).unlink()
        with pytest.raises(UserError, match=rf"is without its {NAME}"):
            lock.require()


def test_nothing_is_left_of_a_folder_in_which_nothing_was_written(tmp_path):
    with pytest.raises(ValueError, match="x"), folder_lock(tmp_path / "a/b", KEY, "test"):
        raise ValueError("x")
    assert listing(tmp_path) == []
    with folder_lock(tmp_path / "a/b", KEY, "test"):
        (tmp_path / "a/b/file").touch()
    assert listing(tmp_path / "a/b") == ["file"]


def test_a_folder_in_which_nothing_was_written_is_of_its_old_age(tmp_path):
    os.utime(tmp_path, (5, 5))
    take(tmp_path)
    assert tmp_path.stat().st_mtime == 5
    with folder_lock(tmp_path, KEY, "test"):
        (tmp_path / "file").touch()
    assert tmp_path.stat().st_mtime > 5


def test_a_fork_does_not_give_back_what_its_parent_has(tmp_path):
    with folder_lock(tmp_path, KEY, "test") as lock:
        if (pid := os.fork()) == 0:
            lock.release()
            os._exit(0)
        os.waitpid(pid, 0)
        lock.require()


NO_LOCKS = {"empty": b"", "text": b"hello", "nested": b"[" * 5000, "other": b'{"host": 1}', "long": b"x" * 1_000_000}


@pytest.mark.parametrize("content", NO_LOCKS.values(), ids=NO_LOCKS)
def test_a_lock_that_names_nobody_counts_for_as_long_as_it_is_fresh(tmp_path, content, monkeypatch):
    monkeypatch.setattr(module, "WRITING_S", 0.0)
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match=rf"in use \({NAME} names no process\); wait for it to end"):
        take(tmp_path)
    os.utime(tmp_path / NAME, (0, 0))
    take(tmp_path)
    assert listing(tmp_path) == []


def test_what_a_lock_says_is_shown_without_control_characters(tmp_path):
    elsewhere(tmp_path, host="\x1b[2Jnode\n\ud800", command="c" * 10_0)
    with pytest.raises(UserError) as caught:
        take(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_file_is_no_lock(tmp_path, kind):
    path = tmp_path / NAME
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("/etc/passwd")}[kind]()
    with pytest.raises(UserError, match=rf"{KEY}: cannot write"):
        take(tmp_path)


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file/run", "dangling"):
        with pytest.raises(UserError, match=rf"{KEY}: cannot write {tmp_path / name}"):
            take(tmp_path / name)


def test_names_of_locks():
    assert is_lock(NAME)
    assert is_lock(f"{NAME}.0123")
    assert not is_lock("run.locked")


def test_no_sum_is_taken_of_a_lock(tmp_path):
    with folder_lock(tmp_path, KEY, "test"):
        (tmp_path / "model.safetensors").write_text("x")
        assert list(take_all(tmp_path)) == ["model.safetensors"]


def test_an_owner_survives_its_file():
    owner = Owner.this_process("searchr1 eval")
    assert Owner.parse(json.dumps(module.asdict(owner)).encode()) == owner
