"""Every algorithm on the demo task with one small budget: held-out exact match before and after, and learning curves.

    python benchmarks/algorithms.py                                       all of them, seeds 0, 1 and 2
    python benchmarks/algorithms.py --only grpo,ppo --seeds 0             some
    python benchmarks/algorithms.py runner.max_steps=16                   another budget: keys of the training's YAML

A run is one `searchr1 train` of the demo's YAML in a process of its own; all share one world and one retrieval server.
What a run found is kept in OUT/<algorithm>-seed<seed>.json, so a second call does only what is missing, and then writes
table.md and curves.svg anew. tests/e2e/test_algorithms_train.py trains the rows of ALGORITHMS too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchr1.data.demo_world.files import write_world
from searchr1.runner.demo import COLD_START, TRAIN_CONFIG, retrieval_server
from searchr1.tracking.loggers import read_metrics

WORLD_SEED = 0
HELD_OUT = 240
BUDGET = (
    "data.rollout_batch_size=8", "algorithm.group_size=8", "algorithm.n_minibatches=2", "runner.max_steps=6",
    "algorithm.kl_beta=0.0", "runner.val_check_interval=1000", "runner.save_interval=-1", "runner.logger.logger_backends=[]",
)  # fmt: skip
"""What all runs share: 6 steps of 64 attempts, 2 updates a step. Evaluated before the first step and after the last."""
NO_GROUPS = ("data.rollout_batch_size=64", "algorithm.group_size=1")
"""As many attempts as BUDGET's, each at another question."""
RUN_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row of the table."""

    title: str
    panel: str
    """Which chart it is drawn on."""
    overrides: tuple[str, ...]
    """What it changes of BUDGET and the demo's YAML."""
    reaches: float | None = None
    """Held-out exact match that a run of this budget must reach."""


ALGORITHMS = {
    "grpo": Algorithm("GRPO", "advantages", ("algorithm.adv_type=grpo",), reaches=0.8),
    "dr_grpo": Algorithm(
        "Dr. GRPO", "advantages", ("algorithm.adv_type=dr_grpo", "algorithm.loss_agg_func=seq-mean-token-sum-norm")
    ),
    "rloo": Algorithm("RLOO", "advantages", ("algorithm.adv_type=rloo",), reaches=0.8),
    "reinforce++": Algorithm("REINFORCE++", "advantages", ("algorithm.adv_type=reinforce++", *NO_GROUPS), reaches=0.8),
    "reinforce++_baseline": Algorithm(
        "REINFORCE++ with group baseline", "advantages", ("algorithm.adv_type=reinforce++_baseline",)
    ),
    "ppo": Algorithm(
        "PPO with a critic",
        "advantages",
        (
            "algorithm.adv_type=gae", "algorithm.normalize_advantages=True", "critic.use_critic_model=True",
            "critic.optim.lr=1.0e-03", "critic.optim.adam_eps=1.0e-08", "critic.optim.weight_decay=0.0", *NO_GROUPS,
        ),
        reaches=0.8,
    ),
    "gspo": Algorithm(
        "GSPO",
        "losses and additions",
        (
            "algorithm.loss_type=gspo", "algorithm.loss_agg_func=seq-mean-token-mean", "algorithm.clip_ratio_low=3.0e-04",
            "algorithm.clip_ratio_high=4.0e-04",
        ),
    ),
    "cispo": Algorithm(
        "CISPO",
        "losses and additions",
        ("algorithm.loss_type=cispo", "algorithm.clip_ratio_low=1.0", "algorithm.clip_ratio_high=4.0"),
    ),
    "sapo": Algorithm("SAPO", "losses and additions", ("algorithm.loss_type=sapo",)),
    "dapo": Algorithm(
        "DAPO: clip-higher and dynamic sampling",
        "losses and additions",
        ("algorithm.clip_ratio_high=0.28", "algorithm.max_refills=2"),
    ),
    "turn": Algorithm("GRPO with turn-level credit", "losses and additions", ("algorithm.advantage_mode=turn",)),
    "llds": Algorithm("GRPO with LLDS", "losses and additions", ("algorithm.llds_coef=0.1",)),
    "kl_in_reward": Algorithm(
        "GRPO with the KL in the reward",
        "KL",
        ("algorithm.kl_in=reward", "algorithm.kl_penalty_type=kl", "algorithm.kl_beta=0.001"),
    ),
    "grpo_dynamic": Algorithm("grpo_dynamic", "KL", ("algorithm.adv_type=grpo_dynamic",)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all runs share: a folder with the world in it, and its retrieval server."""

    folder: Path
    address: str

    def train(self, name: str, overrides: Sequence[str], timeout_s: float = RUN_TIMEOUT_S) -> Path:
        """Run `searchr1 train` to its end in `folder/runs/name`, what it says in train.log there. Returns that folder.

        Raises:
            RuntimeError: it failed, or took longer than `timeout_s`.
        """
        run = self.folder / "runs" / name
        run.mkdir(parents=True, exist_ok=True)
        environment = {
            "SEARCHR1_DEMO_DIR": str(self.folder), "SEARCHR1_SEARCH_ADDR": self.address,
            "SEARCHR1_COLD_START": str(COLD_START),
        }  # fmt: skip
        words = [sys.executable, "-m", "searchr1.cli", "train", str(TRAIN_CONFIG), *BUDGET, *overrides]
        words += [f"runner.experiment_name=runs/{name}", "runner.overwrite=True"]
        words += [f"data.val_data_paths=[{self.folder / 'held-out.jsonl'}]"]
        log = run / "train.log"
        with log.open("w") as output:
            try:
                code = subprocess.call(words, stdout=output, stderr=output, env=os.environ | environment, timeout=timeout_s)
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"{name} took longer than {timeout_s:.0f} s and was ended; see {log}") from error
        if code:
            raise RuntimeError(f"{name} ended with exit code {code}; {log} ends with: {log.read_text()[-1500:]}")
        return run


def prepare(folder: Path) -> None:
    """The world, and the held-out questions that are asked."""
    if not (folder / "world/world.json").exists():
        write_world(WORLD_SEED, folder / "world")
    rows = (folder / "world/test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "held-out.jsonl").write_text("".join(rows[:HELD_OUT]), encoding="utf-8")


def summary(run: Path) -> dict[str, Any]:
    """Of a finished run: exact match and searches on held-out questions before and after, and exact match in training."""
    rows = read_metrics(run / "metrics.jsonl")
    evaluations = [row for row in rows if "val/exact_match" in row]
    steps = [row for row in rows if "reward/exact_match" in row]
    return {
        "before": evaluations[0]["val/exact_match"],
        "after": evaluations[-1]["val/exact_match"],
        "searches_before": evaluations[0]["val/searches"],
        "searches_after": evaluations[-1]["val/searches"],
        "training": [[row["step"], row["reward/exact_match"]] for row in steps],
        "step_seconds": statistics.median(row["time/step"] for row in steps),
    }


def run_missing(folder: Path, names: Sequence[str], seeds: Sequence[int], more: Sequence[str]) -> list[str]:
    """Do every run that has no result yet. Returns what failed."""
    prepare(folder)
    # Seeds outside: after a third of the time every algorithm has one.
    wanted = [(name, seed) for seed in seeds for name in names if kept(folder, name, seed, more) is None]
    failed: list[str] = []
    if not wanted:
        return failed
    with retrieval_server(folder / "world", folder / "retrieval.log") as address:
        surroundings = Surroundings(folder, address)
        started = time.perf_counter()
        for number, (name, seed) in enumerate(wanted, start=1):
            began = time.perf_counter()
            overrides = overrides_of(name, seed, more)
            try:
                found = summary(surroundings.train(f"{name}-seed{seed}", overrides))
            except RuntimeError as error:
                failed.append(f"{name} seed {seed}")
                print(f"[{number}/{len(wanted)}] {error}", flush=True)
                continue
            found |= {"overrides": overrides, "budget": list(BUDGET), "seconds": time.perf_counter() - began}
            path = result_path(folder, name, seed)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1) + "\n")
            os.replace(partial, path)
            left = (time.perf_counter() - started) / number * (len(wanted) - number)
            print(
                f"[{number}/{len(wanted)}] {name} seed {seed}: {found['before']:.3f} -> {found['after']:.3f} in "
                f"{found['seconds']:.0f} s; about {left / 60:.0f} min left",
                flush=True,
            )
    return failed


def overrides_of(name: str, seed: int, more: Sequence[str] = ()) -> list[str]:
    """What a run changes of BUDGET; `more` comes from the command line."""
    return [*ALGORITHMS[name].overrides, *more, f"runner.seed={seed}"]


def result_path(folder: Path, name: str, seed: int) -> Path:
    """Where a run's result is kept."""
    return folder / f"{name}-seed{seed}.json"


def kept(folder: Path, name: str, seed: int, more: Sequence[str]) -> dict[str, Any] | None:
    """A run's result, if there is one with today's settings."""
    path = result_path(folder, name, seed)
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    same = found["overrides"] == overrides_of(name, seed, more) and found["budget"] == list(BUDGET)
    return found if same else None


Results = dict[str, dict[int, dict[str, Any]]]


def table(results: Results, seeds: Sequence[int]) -> str:
    """Markdown: a row per algorithm, a column per seed."""
    heads = ["algorithm", *(f"seed {seed}" for seed in seeds), "mean", "searches", "settings"]
    lines = [" | ".join(["", *heads, ""]).strip(), "|" + " --- |" * len(heads)]
    for name, by_seed in results.items():
        cells = [f"{by_seed[s]['before']:.3f} → {by_seed[s]['after']:.3f}" if s in by_seed else "" for s in seeds]
        mean = statistics.mean(found["after"] for found in by_seed.values())
        searches = statistics.mean(found["searches_after"] for found in by_seed.values())
        settings = ", ".join(override.removeprefix("algorithm.") for override in ALGORITHMS[name].overrides)
        cells = [ALGORITHMS[name].title, *cells, f"{mean:.3f}", f"{searches:.2f}", f"`{settings}`"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def curves(results: Results) -> str:
    """SVG: exact match of the sampled attempts over steps, mean over seeds."""
    from charts import Chart, drawing

    from searchr1.tracking.svg import Series

    panels: dict[str, list[Series]] = {}
    for name, by_seed in results.items():
        runs = [found["training"] for found in by_seed.values()]
        points = [(float(row[0][0]), statistics.mean(em for _, em in row)) for row in zip(*runs, strict=True)]
        panels.setdefault(ALGORITHMS[name].panel, []).append(Series(ALGORITHMS[name].title, points))
    return drawing([Chart(f"Exact match in training: {panel}", lines) for panel, lines in panels.items()], columns=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ALGORITHMS), metavar="NAME,…")
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    args = parser.parse_args()
    if unknown := [name for name in args.only if name not in ALGORITHMS]:
        parser.error(f"--only: no algorithm {', '.join(unknown)}; there are {', '.join(ALGORITHMS)}")
    folder: Path = args.out.resolve()
    failed = run_missing(folder, args.only, args.seeds, args.overrides)
    results: Results = {}
    for name in args.only:
        by_seed = {seed: kept(folder, name, seed, args.overrides) for seed in args.seeds}
        results[name] = {seed: found for seed, found in by_seed.items() if found is not None}
    results = {name: by_seed for name, by_seed in results.items() if by_seed}
    if results:
        text = table(results, args.seeds)
        (folder / "table.md").write_text(text, encoding="utf-8")
        (folder / "curves.svg").write_text(curves(results), encoding="utf-8")
        print(f"\n{text}\n{folder / 'table.md'}\n{folder / 'curves.svg'}")
    for run in failed:
        print(f"failed: {run}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
