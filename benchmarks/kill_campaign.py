"""Kill every process of a training run, in every phase, with every signal, and see what becomes of the run.

    python benchmarks/kill_campaign.py [--out runs/kills] [--kills N] [--only ROLE] [--signal NAME] [--markdown FILE]

A chain of legs: each goes on where the one before was killed (`runner.resume_dir=auto`) and takes a few steps, with a
process stopped or the retrieval server taken away in some of them, until a signal ends it too. The last leg runs to the
end, and every row of `metrics.jsonl` is compared with those of a run that nobody touched. There is one chain for each
training backend, of the demo's model on a CPU with a real retrieval server: about a minute a leg on two idle cores.

What was done is kept in OUT: the same command goes on with the rest, and `--kills N` stops after N more. Required of every
kill: a line names the process, or the run ends, within 15 s; no traceback; 15 s after the end no process and no new file in
/dev/shm is left; a signal to the driver gives its exit code (143, 129, 130), a death inside one above 0; the next leg goes
on after the last step that was finished; the metrics are the unbroken run's. Exit code 1 if something is not so. Nothing
else may use /dev/shm meanwhile (`unshare -m`, and a tmpfs mounted there, gives it one of its own).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kills.leg import NOTICE_S, Kill, Leg, Outcome, Setting
from kills.processes import Server

from searchr1.demo.files import write_world
from searchr1.tracking.loggers import read_metrics

ROOT = Path(__file__).resolve().parents[1]

ENDING = {
    "fsdp": """
        driver boot KILL     driver rollout TERM  actor update KILL    gcs rollout KILL      driver start TERM
        channel rollout KILL rollout weights KILL driver save INT      raylet rollout KILL   actor start KILL
        reward rollout KILL  driver weights HUP   inference rollout KILL driver save KILL    gcs start KILL
        rollout rollout KILL driver update TERM   actor save KILL      driver start INT      raylet update KILL
        channel update KILL  actor weights KILL   driver rollout KILL  gcs save KILL         driver boot TERM
        rollout start KILL   driver rollout HUP   actor rollout KILL   driver save TERM      gcs weights KILL
        inference update KILL driver start KILL   rollout update KILL  channel save KILL     driver weights KILL
        raylet start KILL    driver rollout INT   rollout rollout TERM reward start KILL     driver update KILL
        actor update TERM
    """,
    "megatron": """
        driver save KILL     actor weights KILL   driver weights TERM  actor save KILL       inference rollout KILL
        actor update KILL    gcs update KILL      rollout weights KILL
    """,
}
"""What ends a leg: role, phase, signal."""
SURVIVED = {
    "fsdp": """
        server rollout KILL  actor update STOP    rollout rollout STOP server rollout STOP   gcs rollout STOP
        channel rollout STOP driver rollout STOP  raylet update STOP   inference rollout STOP reward rollout STOP
        server rollout TERM  actor save STOP      rollout weights STOP driver save STOP
    """,
    "megatron": "server rollout KILL actor save STOP driver update STOP",
}
"""What a leg survives: each is done in a step of its own before the leg's end."""
STEPS = {"fsdp": 110, "megatron": 36}
OVERRIDES = {"fsdp": (), "megatron": ("actor.training_backend=megatron",)}
NOT_COMPARED = ("time/", "tool/seconds", "tool/retries", "tool/server_", "rollout/tokens_per_second", "rollout/engine_busy")
"""Metrics of how long something took, and of what the search client did about an outage."""
NAMES = {
    "rollout": "RolloutGroup", "actor": "ActorGroup", "reward": "RewardGroup", "inference": "InferenceGroup",
    "channel": "the channel", "raylet": "Ray's raylet", "gcs": "Ray's GCS", "server": "tools.search.server_addr",
}  # fmt: skip
"""What a message calls a process."""
NEAR = 1e-3
"""How far a metric may be off where work was in flight: the engine's batches were put together differently."""


def kills_of(text: str) -> list[Kill]:
    """Read a table."""
    words = text.split()
    return [Kill(*words[i : i + 3]) for i in range(0, len(words), 3)]


def plan(setting: str, roles: Collection[str], signals: Collection[str]) -> list[list[Kill]]:
    """The kills of each leg; the last leg has none and runs to the end."""

    def wanted(text: str) -> list[Kill]:
        return [k for k in kills_of(text) if (not roles or k.role in roles) and (not signals or k.signal in signals)]

    legs = [[kill] for kill in wanted(ENDING[setting])]
    # A run that dies while it starts takes no step in which anything could be survived.
    able = [leg for leg in legs if leg[-1].phase not in ("boot", "start")]
    survived = wanted(SURVIVED[setting])
    if not able and survived:
        able = [[]]
        legs += able
    for number, kill in enumerate(survived):
        leg = able[number % len(able)]
        leg.insert(number // len(able), kill)
    return [*legs, []]


def settings(out: Path, server: Server, names: Sequence[str]) -> list[Setting]:
    """The runs."""
    return [Setting(name, out / name, server, STEPS[name], OVERRIDES[name]) for name in names]


def unbroken(setting: Setting) -> dict[int, Mapping[str, Any]]:
    """The rows of a run that nobody touches; made once."""
    folder = setting.folder / "unbroken"
    metrics = folder / "metrics.jsonl"
    if not metrics.exists() or len(read_metrics(metrics)) < setting.steps:
        print(f"{setting.name}: an unbroken run of {setting.steps} steps", flush=True)
        setting.folder.mkdir(parents=True, exist_ok=True)
        with (setting.folder / "unbroken.log").open("w", encoding="utf-8") as log:
            words = [sys.executable, "-m", "searchr1.cli", *setting.command("unbroken")]
            subprocess.run(words, env=setting.environment(), cwd=ROOT, stdout=log, stderr=log, check=True)
    return {row["step"]: row for row in read_metrics(metrics)}


def run_legs(setting: Setting, legs: list[list[Kill]], seed: int, most: int) -> int:
    """Go through the legs that were not done before, up to `most` kills. Returns how many it were."""
    done = {outcome.leg for outcome in outcomes_of(setting)}
    count = 0
    for number, kills in enumerate(legs):
        if number in done or count >= most:
            continue
        outcomes = Leg(setting, number, kills, seed).run()
        count += len(kills)
        with (setting.folder / "kills.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
        for kill, outcome in zip(kills or ["to the end"], outcomes, strict=False):
            verdict = "; ".join(outcome.problems) or "as required"
            noticed = seconds(outcome.noticed_s)
            print(f"{setting.name} leg {number}: {kill}: {noticed}, {verdict} [{outcome.message[:160]}]", flush=True)
    return count


def outcomes_of(setting: Setting) -> list[Outcome]:
    """What was done so far."""
    path = setting.folder / "kills.jsonl"
    return [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """The largest relative difference of two rows' metrics, those of time left out; inf if other metrics are there."""
    keys = [key for key in {**expected, **found} if not key.startswith(NOT_COMPARED)]
    worst = 0.0
    for key in keys:
        a, b = expected.get(key, math.nan), found.get(key, math.nan)
        if a == b or (a is None and b is None):
            continue
        if a is None or b is None or math.isnan(a) or math.isnan(b):
            return math.inf
        # Those that measure rounding itself are all rounding.
        worst = max(worst, abs(a - b) / max(abs(a), abs(b), 1e-2))
    return worst


def judge(setting: Setting, outcomes: Sequence[Outcome], expected: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each kill's outcome, with whether the run went on where it was, and whether its step's metrics are right."""
    path = setting.run / "metrics.jsonl"
    rows = {row["step"]: row for row in read_metrics(path)} if path.exists() else {}
    began = {outcome.leg: outcome.began_after for outcome in outcomes}
    ended = {outcome.leg: outcome.checkpoint for outcome in outcomes if outcome.ends}
    judged = []
    for outcome in outcomes:
        if not outcome.role:
            continue
        entry: dict[str, Any] = asdict(outcome) | {"went_on": "ran on", "metrics": "—"}
        problems: list[str] = entry["problems"]
        if outcome.ends:
            following = began.get(outcome.leg + 1)
            entry["went_on"] = "not yet" if following is None else f"after step {following}"
            if following is not None and following != ended[outcome.leg]:
                problems.append(f"went on after step {following} instead of {ended[outcome.leg]}")
        name = NAMES.get(outcome.role, f"SIG{outcome.signal}")
        silent = outcome.role == "driver" and outcome.signal in ("KILL", "STOP")  # it can say nothing
        if not silent and name not in outcome.message:
            problems.append(f"{'the message does not name' if outcome.message else 'no message names'} {name}")
        step = outcome.step or outcome.checkpoint + 1
        if step in rows and step in expected:
            off = difference(expected[step], rows[step])
            entry["metrics"] = "equal" if off == 0 else f"within {off:.0e}"
            in_flight = not outcome.ends and outcome.phase == "rollout"
            if off > (NEAR if in_flight else 0):
                problems.append(f"step {step} differs from the unbroken run by {off:.1e}")
        judged.append(entry)
    return judged


def all_rows(setting: Setting, expected: Mapping[int, Mapping[str, Any]]) -> str:
    """How the whole of a finished chain compares."""
    path = setting.run / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    steps = [row["step"] for row in rows]
    if steps != list(range(1, len(steps) + 1)):
        return f"PROBLEM {setting.name}: the steps in metrics.jsonl are not 1, 2, 3 …: {steps}"
    off = [difference(expected[row["step"]], row) for row in rows]
    equal = sum(value == 0 for value in off)
    text = f"{setting.name}: {equal} of {len(rows)} steps equal the unbroken run's"
    return text if equal == len(rows) else f"{text}; the largest relative difference is {max(off):.1e}"


def seconds(value: float | None) -> str:
    """A time for people."""
    return "—" if value is None else f"{value:.1f} s"


def table(judged: Sequence[Mapping[str, Any]]) -> str:
    """All kills, as Markdown."""
    heads = ["backend", "what", "while", "signal", "noticed", "exit code", "left behind", "went on", "metrics", "it said"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for k in judged:
        left = ", ".join([*k["processes"], *k["shm"]]) or "nothing"
        code = str(k["exit_code"]) if k["ends"] else "—"
        said = k["message"].removeprefix("searchr1 train: ").replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
        said = said if len(said) <= 100 else f"{said[:97]}…"
        cells = [k["setting"], k["role"], k["phase"], f"SIG{k['signal']}", seconds(k["noticed_s"]), code, left]
        lines.append(f"| {' | '.join([*cells, k['went_on'], k['metrics'], said])} |")
    return "\n".join(lines)


def summary(judged: Sequence[Mapping[str, Any]]) -> str:
    """In a few lines."""
    noticed = [k["noticed_s"] for k in judged if k["noticed_s"] is not None]
    signals = Counter(f"SIG{k['signal']}" for k in judged)
    lines = [
        f"{len(judged)} kills ({', '.join(f'{count} {name}' for name, count in sorted(signals.items()))}) of "
        f"{', '.join(sorted({k['role'] for k in judged}))}",
        f"noticed after {max(noticed, default=0.0):.1f} s at most (limit {NOTICE_S:.0f} s)",
    ]
    for k in judged:
        if k["problems"]:
            lines.append(f"PROBLEM {k['setting']} {k['role']} {k['phase']} SIG{k['signal']}: {'; '.join(k['problems'])}")
    good = sum(not k["problems"] for k in judged)
    return "\n".join([*lines, f"{good} of {len(judged)} as required"])


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Kill a training run in every way, and see what becomes of it.")
    parser.add_argument("--out", type=Path, default=Path("runs/kills"), help="folder for everything (default runs/kills)")
    parser.add_argument("--kills", type=int, default=1000, help="stop after about so many more (default: all)")
    parser.add_argument("--backend", choices=sorted(ENDING), help="only this one (default: all)")
    parser.add_argument("--only", action="append", default=[], metavar="ROLE", help="kill these only, for instance actor")
    parser.add_argument("--signal", action="append", default=[], metavar="NAME", help="only with these, for instance KILL")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--report", action="store_true", help="kill nothing more, and report what was done")
    parser.add_argument("--json", type=Path, help="write all outcomes there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    world = out / "world"
    if not (world / "world.json").exists():
        write_world(5, world)
    server = Server(world, out / "retrieval.log")
    judged: list[dict[str, Any]] = []
    rows: list[str] = []
    unfinished = False
    try:
        if not args.report:
            server.start()
        most = 0 if args.report else args.kills
        for setting in settings(out, server, [args.backend] if args.backend else list(ENDING)):
            legs = plan(setting.name, args.only, args.signal)
            if len(legs) > 1 and (most > 0 or outcomes_of(setting)):
                expected = unbroken(setting)
                most -= run_legs(setting, legs, args.seed, most)
                outcomes = outcomes_of(setting)
                judged += judge(setting, outcomes, expected)
                rows.append(all_rows(setting, expected))
                unfinished |= len({outcome.leg for outcome in outcomes}) < len(legs)
    finally:
        server.stop()
    text = "\n".join([summary(judged), *rows])
    print(f"\n{table(judged)}\n\n{text}{chr(10) + 'not finished: the same command goes on' if unfinished else ''}")
    for path, content in ((args.json, json.dumps(judged, indent=1)), (args.markdown, f"{table(judged)}\n\n{text}")):
        if path is not None:
            path.write_text(f"{content}\n", encoding="utf-8")
    return 1 if "PROBLEM" in text or not judged else 0


if __name__ == "__main__":
    sys.exit(main())
