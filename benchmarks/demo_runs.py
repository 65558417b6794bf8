"""Many short trainings of the demo task, for the benchmarks beside this file: one world, one server, results kept."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchr1.demo.demo import COLD_START, CPU_RECIPES
from searchr1.demo.files import write_world
from searchr1.demo.processes import retrieval_server
from searchr1.tracking.loggers import read_metrics

WORLD_SEED = 0
HELD_OUT = 240
RUN_TIMEOUT_S = 1800.0
TRAIN = (sys.executable, "-m", "searchr1.cli", "train")


@dataclass(frozen=True, slots=True)
class Run:
    """One training: the demo's YAML with overrides."""

    name: str
    budget: tuple[str, ...]
    """What it shares with others."""
    overrides: tuple[str, ...]
    """What is its own."""
    command: tuple[str, ...] = TRAIN
    """Another one must take the same arguments."""

    def kept(self, folder: Path) -> dict[str, Any] | None:
        """Its result from an earlier call, if that had the same settings."""
        path = self.result_path(folder)
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = found["budget"] == list(self.budget) and found["overrides"] == list(self.overrides)
        return found if same else None

    def keep(self, folder: Path, found: dict[str, Any]) -> None:
        """Write its result."""
        path = self.result_path(folder)
        partial = path.with_suffix(".partial")
        settings = {"budget": list(self.budget), "overrides": list(self.overrides)}
        partial.write_text(json.dumps(found | settings, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)

    def result_path(self, folder: Path) -> Path:
        """Where its result is kept."""
        return folder / f"{self.name}.json"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all runs share: a folder with the world in it (`prepare`), and its retrieval server."""

    folder: Path
    address: str

    def train(self, run: Run, timeout_s: float = RUN_TIMEOUT_S) -> Path:
        """Run it to its end in `folder/runs/<name>`, what it says in train.log there. Returns that folder.

        Raises:
            RuntimeError: it failed, or took longer than `timeout_s`.
        """
        path = self.folder / "runs" / run.name
        path.mkdir(parents=True, exist_ok=True)
        environment = {
            "SEARCHR1_DEMO_DIR": str(self.folder), "SEARCHR1_SEARCH_ADDR": self.address,
            "SEARCHR1_COLD_START": str(COLD_START),
        }  # fmt: skip
        words = [*run.command, str(CPU_RECIPES.train), *run.budget, *run.overrides]
        words += [f"runner.experiment_name=runs/{run.name}", "runner.overwrite=True"]
        words += [f"data.val_data_paths=[{self.folder / 'held-out.jsonl'}]"]
        log = path / "train.log"
        with log.open("w", encoding="utf-8") as output:
            try:
                code = subprocess.call(words, stdout=output, stderr=output, env=os.environ | environment, timeout=timeout_s)
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"{run.name} took longer than {timeout_s:.0f} s and was ended; see {log}") from error
        if code:
            raise RuntimeError(
                f"{run.name} ended with exit code {code}; {log} ends with: {log.read_text(encoding='utf-8')[-1500:]}"
            )
        return path


def prepare(folder: Path) -> None:
    """The world, and the held-out questions that are asked."""
    if not (folder / "world/world.json").exists():
        write_world(WORLD_SEED, folder / "world")
    rows = (folder / "world/test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "held-out.jsonl").write_text("".join(rows[:HELD_OUT]), encoding="utf-8")


def summary(path: Path, curves: Sequence[str] = ()) -> dict[str, Any]:
    """Of a finished run's folder: exact match and searches on held-out questions before and after, and curves.

    Args:
        path: the folder.
        curves: metrics to keep beside exact match in training and held-out, as [step, value] of every row that has them.
    """
    rows = read_metrics(path / "metrics.jsonl")
    evaluations = [row for row in rows if "val/exact_match" in row]
    found = {
        "before": evaluations[0]["val/exact_match"],
        "after": evaluations[-1]["val/exact_match"],
        "searches_before": evaluations[0]["val/searches"],
        "searches_after": evaluations[-1]["val/searches"],
        "training": [[row["step"], row["reward/exact_match"]] for row in rows if "reward/exact_match" in row],
        "step_seconds": statistics.median(row["time/step"] for row in rows if "time/step" in row),
    }
    for name in curves:
        found[name] = [[row["step"], row[name]] for row in rows if row.get(name) is not None]
    return found


def run_missing(folder: Path, runs: Sequence[Run], curves: Sequence[str] = ()) -> list[str]:
    """Do every run that has no result yet; `curves` as for `summary`. Returns the names of those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    wanted = [run for run in runs if run.kept(folder) is None]
    failed: list[str] = []
    if not wanted:
        return failed
    with retrieval_server(folder / "world", folder / "retrieval.log") as server:
        surroundings = Surroundings(folder, server.address)
        started = time.perf_counter()
        for number, run in enumerate(wanted, start=1):
            began = time.perf_counter()
            try:
                found = summary(surroundings.train(run), curves)
            except RuntimeError as error:
                failed.append(run.name)
                print(f"[{number}/{len(wanted)}] {error}", flush=True)
                continue
            seconds = time.perf_counter() - began
            run.keep(folder, found | {"seconds": seconds})
            left = (time.perf_counter() - started) / number * (len(wanted) - number)
            print(
                f"[{number}/{len(wanted)}] {run.name}: {found['before']:.3f} -> {found['after']:.3f} in {seconds:.0f} s; "
                f"about {left / 60:.0f} min left",
                flush=True,
            )
    return failed


def mean_curve(results: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, mean over runs) of a curve in their results, at the steps that all of them have."""
    values: dict[int, list[float]] = defaultdict(list)
    for found in results:
        for step, value in found[name]:
            values[step].append(value)
    return [(float(step), statistics.mean(row)) for step, row in sorted(values.items()) if len(row) == len(results)]


def numbers(text: str) -> list[int]:
    """ "0,1,2" from the command line."""
    return [int(part) for part in text.split(",")]
