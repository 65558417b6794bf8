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
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charts import Chart, drawing
from demo_runs import Run, mean_curve, numbers, run_missing
from line_charts import Series

BUDGET = (
    "data.rollout_batch_size=8", "algorithm.group_size=8", "algorithm.n_minibatches=2", "runner.max_steps=6",
    "algorithm.kl_beta=0.0", "runner.val_check_interval=1000", "runner.save_interval=-1", "runner.logger.logger_backends=[]",
)  # fmt: skip
"""What all runs share: 6 steps of 64 attempts, 2 updates a step. Evaluated before the first step and after the last."""
NO_GROUPS = ("data.rollout_batch_size=64", "algorithm.group_size=1")
"""As many attempts as BUDGET's, each at another question."""
GOOD = 0.8


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
        "REINFORCE++ with baseline", "advantages", ("algorithm.adv_type=reinforce++_baseline",)
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
        "losses",
        (
            "algorithm.loss_type=gspo", "algorithm.loss_agg_func=seq-mean-token-mean", "algorithm.clip_ratio_low=3.0e-04",
            "algorithm.clip_ratio_high=4.0e-04",
        ),
    ),
    "cispo": Algorithm(
        "CISPO",
        "losses",
        ("algorithm.loss_type=cispo", "algorithm.clip_ratio_low=1.0", "algorithm.clip_ratio_high=4.0"),
    ),
    "sapo": Algorithm("SAPO", "losses", ("algorithm.loss_type=sapo",)),
    "dapo": Algorithm(
        "DAPO (dynamic sampling)",
        "additions to GRPO",
        ("algorithm.clip_ratio_high=0.28", "algorithm.max_refills=2"),
    ),
    "turn": Algorithm("turn-level advantages", "additions to GRPO", ("algorithm.advantage_mode=turn",)),
    "llds": Algorithm("LLDS", "additions to GRPO", ("algorithm.llds_coef=0.1",)),
    "kl_in_reward": Algorithm(
        "KL in the reward",
        "additions to GRPO",
        ("algorithm.kl_in=reward", "algorithm.kl_penalty_type=kl", "algorithm.kl_beta=0.001"),
    ),
    "grpo_dynamic": Algorithm("grpo_dynamic", "additions to GRPO", ("algorithm.adv_type=grpo_dynamic",)),
}  # fmt: skip


def run_of(name: str, seed: int, more: Sequence[str] = ()) -> Run:
    """An algorithm's training with a seed; `more` comes from the command line."""
    return Run(f"{name}-seed{seed}", BUDGET, (*ALGORITHMS[name].overrides, *more, f"runner.seed={seed}"))


Results = dict[str, dict[int, dict[str, Any]]]


def table(results: Results, seeds: Sequence[int]) -> str:
    """Markdown: a row per algorithm, a column per seed."""
    heads = ["algorithm", *(f"seed {seed}" for seed in seeds), "searches", f"sampled ≥ {GOOD} at step"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, by_seed in results.items():
        runs = list(by_seed.values())
        changes = [f"{by_seed[s]['before']:.3f} → {by_seed[s]['after']:.3f}" if s in by_seed else "" for s in seeds]
        searches = statistics.mean(found["searches_after"] for found in runs)
        reached = ", ".join(first_good_step(found["training"]) for found in runs)
        cells = [ALGORITHMS[name].title, *changes, f"{searches:.2f}", reached]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def first_good_step(training: list[list[float]]) -> str:
    """The first step whose sampled attempts have an exact match of at least GOOD."""
    return next((f"{step:.0f}" for step, exact_match in training if exact_match >= GOOD), "never")


def curves(results: Results) -> str:
    """SVG: exact match of the sampled attempts over steps, mean over the seeds that all algorithms have."""
    common = sorted(set.intersection(*(set(by_seed) for by_seed in results.values())))
    panels: dict[str, list[Series]] = {}
    for name, by_seed in results.items():
        points = mean_curve([by_seed[seed] for seed in common], "training")
        panels.setdefault(ALGORITHMS[name].panel, []).append(Series(ALGORITHMS[name].title, points))
    seeds = f"seed{'s' * (len(common) > 1)} {', '.join(map(str, common))}"
    return drawing([Chart(f"Sampled exact match: {panel} ({seeds})", lines) for panel, lines in panels.items()], 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ALGORITHMS), metavar="NAME,…")
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    args = parser.parse_args()
    if unknown := [name for name in args.only if name not in ALGORITHMS]:
        parser.error(f"--only: no algorithm {', '.join(unknown)}; there are {', '.join(ALGORITHMS)}")
    folder: Path = args.out.resolve()
    # Seeds outside: after a third of the time every algorithm has one.
    failed = run_missing(folder, [run_of(name, seed, args.overrides) for seed in args.seeds for name in args.only])
    results: Results = {}
    for name in args.only:
        by_seed = {seed: run_of(name, seed, args.overrides).kept(folder) for seed in args.seeds}
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
