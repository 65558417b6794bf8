"""The kill campaign sees what it is there to see: with scripted runs in place of real ones, which need minutes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import kill_campaign
import pytest
from kills import leg as leg_module
from kills import processes
from kills.leg import Kill, Leg, Outcome, Setting

ROLES = {"driver", "rollout", "actor", "reward", "inference", "channel", "raylet", "gcs", "server"}
PHASES = {"start", "rollout", "update", "weights", "save"}
SIGNALS = {"KILL", "STOP", "TERM", "HUP", "INT"}


def test_the_plan_has_every_role_phase_and_signal_and_ends_each_leg():
    legs = [leg for backend in kill_campaign.ENDING for leg in kill_campaign.plan(backend, [], [])]
    kills = [kill for leg in legs for kill in leg]
    assert len(kills) >= 60
    assert {kill.role for kill in kills} == ROLES
    assert {kill.phase for kill in kills} >= PHASES
    assert {kill.signal for kill in kills} == SIGNALS
    assert {kill.phase for kill in kills if kill.role == "driver" and kill.signal == "TERM"} >= PHASES
    for leg in legs:
        assert not any(leg_module.ends(kill) for kill in leg[:-1]), "nothing follows an end"
    for backend in kill_campaign.ENDING:
        assert kill_campaign.plan(backend, [], [])[-1] == [], "the last leg runs to the end"
    table = [kill for text in kill_campaign.ENDING.values() for kill in kill_campaign.kills_of(text)]
    assert all(leg_module.ends(kill) for kill in table)


def test_a_part_of_the_plan():
    legs = kill_campaign.plan("fsdp", ["actor"], ["KILL", "STOP"])
    assert {kill.role for leg in legs for kill in leg} == {"actor"}
    assert {kill.signal for leg in legs for kill in leg} == {"KILL", "STOP"}
    assert [str(kill) for leg in kill_campaign.plan("fsdp", ["server"], ["KILL"]) for kill in leg] == ["server rollout KILL"]


@pytest.mark.parametrize(
    ("expected", "found", "off"),
    [
        ({"a": 1.0, "time/step": 3.0}, {"a": 1.0, "time/step": 9.0, "tool/retries": 4.0}, 0.0),
        ({"a": 1.0}, {"a": 1.1}, 0.1 / 1.1),
        ({"a": 0.0}, {"a": 1e-5}, 1e-3),  # what is nothing but rounding is compared with a hundredth
        ({"a": 1.0}, {"a": 1.0, "b": 0.0}, float("inf")),
        ({"a": None}, {"a": None}, 0.0),
        ({"a": None}, {"a": 1.0}, float("inf")),
    ],
)
def test_rows_are_compared_without_what_is_time(expected, found, off):
    assert kill_campaign.difference(expected, found) == pytest.approx(off)


def setting(folder: Path, script: str) -> Setting:
    program = folder / "run.py"
    program.write_text(f"import os, signal, subprocess, sys, time\nmarks = int(sys.argv[1])\n{script}")
    server = processes.Server(folder, folder / "retrieval.log")
    return Setting("scripted", folder, server, 9, program=(sys.executable, "-u", str(program)))


BEGIN = """
print("going on after step 3 from somewhere")
for step in range(2):
    os.write(marks, b"begin RolloutGroup.rollout\\n")
    time.sleep(0.05)
"""
CLEAN = """
def stop(number, frame):
    print("stopped by a signal after step 4; go on with runner.resume_dir=auto")
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, stop)
"""
WAIT = "time.sleep(60)\n"
CHILD = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Short waits, and a folder in place of shared memory."""
    shared = tmp_path / "shm"
    shared.mkdir()
    monkeypatch.setattr(processes, "SHARED_MEMORY", shared)
    monkeypatch.setattr(processes, "WATCH_EVERY_S", 0.02)
    monkeypatch.setattr(leg_module, "NOTICE_S", 0.7)
    monkeypatch.setattr(leg_module, "PATIENCE_S", 1.5)
    monkeypatch.setattr(leg_module, "STOP_S", 0.3)
    checkpoint = tmp_path / "killed/checkpoints/global_step_4"
    checkpoint.mkdir(parents=True)
    return shared


def struck(folder: Path, script: str, *kills: str) -> list[Outcome]:
    return Leg(setting(folder, script), 0, [Kill(*kill.split()) for kill in kills], seed=0).run()


@pytest.mark.parametrize(("signal", "code"), [("TERM", 143), ("HUP", 129), ("INT", 130)])
def test_a_clean_stop_is_as_required(quick, tmp_path, signal, code):
    [outcome] = struck(tmp_path, CLEAN + BEGIN + WAIT, f"driver rollout {signal}")
    assert (outcome.problems, outcome.exit_code) == ([], code)
    assert outcome.message == "stopped by a signal after step 4; go on with runner.resume_dir=auto"
    assert (outcome.began_after, outcome.step, outcome.checkpoint) == (3, 5, 4)
    assert outcome.noticed_s is not None
    assert "stopped by a signal" in (tmp_path / "leg-00.log").read_text()


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (BEGIN + WAIT, "exit code -15 instead of 143"),
        (CLEAN + BEGIN + CHILD + WAIT, "processes left: python"),
        (CLEAN.replace('print("st', 'print("Traceback", "st') + BEGIN + WAIT, "a traceback is printed"),
        (CLEAN.replace("print", "time.sleep(1.0); print") + BEGIN + WAIT, "noticed after 1."),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + BEGIN + WAIT, "still ran after 2 s"),
        (CLEAN + BEGIN + "open('SHM/left', 'w')\n" + WAIT, "1 files left in /dev/shm"),
        (CLEAN + BEGIN.replace("step 3", "step 7") + WAIT, "step 8 is lost"),
        (CLEAN + "print('no step')\n" + WAIT, "rollout did not come within 2 s"),
        ("print('no step')\n", "the run ended by itself before"),
    ],
)
def test_what_is_not_as_required_is_a_problem(quick, tmp_path, script, problem):
    [outcome] = struck(tmp_path, script.replace("SHM", str(quick)), "driver rollout TERM")
    assert any(problem in found.replace("python3.11", "python") for found in outcome.problems), outcome.problems


def test_a_stopped_process_goes_on_and_another_kill_follows(quick, tmp_path):
    script = CLEAN + BEGIN + "time.sleep(0.5)\nos.write(marks, b'begin RolloutGroup.rollout\\n')\n" + WAIT
    (tmp_path / "killed/checkpoints/global_step_5").mkdir()
    first, last = struck(tmp_path, script, "driver rollout STOP", "driver rollout TERM")
    assert (first.ends, first.problems, first.noticed_s) == (False, [], None)
    assert (last.ends, last.problems, last.exit_code, last.step) == (True, [], 143, 6)


def test_the_next_leg_says_whether_a_run_went_on_and_the_table_has_it(tmp_path):
    chain = setting(tmp_path, "")
    chain.run.mkdir(parents=True)
    rows = [{"step": step, "actor/kl": float(step), "time/step": 1.0} for step in (1, 2, 3)]
    (chain.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {row["step"]: row | {"time/step": 2.0} for row in rows}
    common = ("scripted", "actor", "update", "KILL", True)
    seen = {"message": "rank 0 of ActorGroup | b", "exit_code": 1}
    outcomes = [
        Outcome(common[0], 0, *common[1:], step=2, checkpoint=1, noticed_s=0.5, **seen),
        Outcome(common[0], 1, *common[1:], began_after=1, step=3, checkpoint=2, noticed_s=1.0, **seen),
        Outcome(common[0], 2, *common[1:], began_after=1, checkpoint=3, **seen),
    ]
    judged = kill_campaign.judge(chain, outcomes, expected)
    assert [entry["went_on"] for entry in judged] == ["after step 1", "after step 1", "not yet"]
    assert [entry["problems"] for entry in judged] == [[], ["went on after step 1 instead of 2"], []]
    assert [entry["metrics"] for entry in judged] == ["equal", "equal", "—"]
    expected[3]["actor/kl"] = 3.3
    assert "differs" in kill_campaign.judge(chain, outcomes, expected)[1]["problems"][-1]
    outcomes[0].message = "Ray's raylet has died"
    assert kill_campaign.judge(chain, outcomes, expected)[0]["problems"] == ["the message does not name ActorGroup"]
    outcomes[0].message = ""
    assert kill_campaign.judge(chain, outcomes, expected)[0]["problems"] == ["no message names ActorGroup"]
    assert "2 of 3 steps equal" in kill_campaign.all_rows(chain, expected)
    table = kill_campaign.table(judged).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "2 of 3 as required" in kill_campaign.summary(judged)
