"""Weights that are four steps old, and an engine in bf16: the demo task with and without corrections.

    python benchmarks/mismatch.py                                    every run, seeds 0 and 1
    python benchmarks/mismatch.py --only stale --seeds 0             one experiment
    python benchmarks/mismatch.py --only stale-token,stale-none      some of its runs

Held-out questions are always answered with the actor's newest weights. Results are kept in OUT as benchmarks/algorithms.py
keeps them; at the end OUT has a table and a drawing of each experiment, over the seeds that are there. Old weights are no
feature of `searchr1 train`: `OldWeights` stands between the actor and the engines, in a process that runs the same command.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from charts import Chart, drawing
from demo_runs import TRAIN, Run, mean_curve, numbers, run_missing
from line_charts import Series

from searchr1.rollout.weights import WeightPublisher, WeightReader

DELAY = 4
COMMON = (
    "data.rollout_batch_size=8", "algorithm.group_size=8", "algorithm.n_minibatches=2", "algorithm.kl_beta=0.0",
    "runner.max_steps=16", "runner.val_check_interval=4", "runner.save_interval=-1", "runner.logger.logger_backends=[]",
    "runner.health.warn_only=True",
)  # fmt: skip
"""What all runs share: 16 steps of 64 attempts, 2 updates a step, and no stop where the mismatch is unhealthy."""
WITH_OLD_WEIGHTS = "--train-with-weights-of"
STALE = (sys.executable, os.path.abspath(__file__), WITH_OLD_WEIGHTS, str(DELAY))
CORRECTION = "algorithm.mismatch_correction"
TOKEN = (f"{CORRECTION}.level=token", f"{CORRECTION}.bound=truncate", f"{CORRECTION}.upper=2.0")
SEQUENCE = (
    f"{CORRECTION}.level=sequence", f"{CORRECTION}.bound=mask", f"{CORRECTION}.lower=0.5", f"{CORRECTION}.upper=2.0",
)  # fmt: skip
ENGINE = ("algorithm.recompute_logprobs=False",)
FAST = ("actor.optim.lr=3.0e-04",)
"""Three times the demo's learning rate: where the demo's shows little."""
BF16 = ("rollout.model.precision=bf16", *FAST)
CURVES = (
    "val/exact_match", "reward/exact_match", "mismatch/kl", "mismatch/kl_k3", "mismatch/effective_sample_size",
    "mismatch/logprob_gap", "mismatch/logprob_gap_max", "actor/correction_bounded", "actor/correction_weight",
    "actor/clip_fraction", "actor/grad_norm", "rollout/entropy",
)  # fmt: skip
PANELS = {
    "Held-out exact match, newest weights": "val/exact_match",
    "Exact match of the sampled attempts": "reward/exact_match",
    "KL(engine, actor) per token": "mismatch/kl",
    "Gradient norm before clipping": "actor/grad_norm",
}


@dataclass(frozen=True, slots=True)
class Arm:
    """A line of the charts."""

    title: str
    overrides: tuple[str, ...]
    command: tuple[str, ...] = TRAIN


EXPERIMENTS = {
    "stale": {
        "fresh": Arm("newest weights", ()),
        "none": Arm("4 steps old, no correction", (), STALE),
        "token": Arm("4 steps old, token weights cut at 2", TOKEN, STALE),
        "sequence": Arm("4 steps old, sequences outside .5 to 2 masked", SEQUENCE, STALE),
        "engine": Arm("4 steps old, engine's log-probabilities as old", ENGINE, STALE),
    },
    "bf16": {
        "fp32": Arm("engine in fp32", FAST),
        "none": Arm("bf16, no correction", BF16),
        "token": Arm("bf16, token weights cut at 2", (*BF16, *TOKEN)),
        "sequence": Arm("bf16, sequences outside .5 to 2 masked", (*BF16, *SEQUENCE)),
        "engine": Arm("bf16, engine's log-probabilities as old", (*BF16, *ENGINE)),
    },
}


class OldWeights:
    """Gives the engines the weights of `delay` steps ago (before that many steps, the first ones); evaluations today's."""

    def __init__(self, delay: int, folder: Path) -> None:
        self._delay = delay
        self._kept: deque[tuple[int, dict[str, torch.Tensor]]] = deque()
        self._reader = WeightReader(torch.device("cpu"))
        self._publisher = WeightPublisher(folder, 64 << 20)

    def send(self, cluster: Any, version: int) -> None:
        """In place of `searchr1.training.weight_sync.send_weights`."""
        named: dict[str, torch.Tensor] = {}
        self._reader.start()
        bucket = cluster.actor.publish_weights(version).wait()[0]
        while True:
            named |= {name: tensor.clone() for name, tensor in self._reader.read(bucket)}
            if bucket.last:
                break
            bucket = cluster.actor.next_bucket().wait()[0]
        cluster.actor.release_weights(bucket).wait()
        self._kept.append((version, named))
        if len(self._kept) > self._delay + 1:
            self._kept.popleft()
        self._load(cluster, *self._kept[0])

    def validate(self, cluster: Any, samples: Any, config: Any, log: Any, step: int) -> Any:
        """In place of `searchr1.evaluation.evaluate.validate`."""
        from searchr1.evaluation.evaluate import validate

        self._load(cluster, *self._kept[-1])
        metrics = validate(cluster, samples, config, log, step)
        self._load(cluster, *self._kept[0])
        return metrics

    def _load(self, cluster: Any, version: int, named: dict[str, torch.Tensor]) -> None:
        elements = sum(tensor.numel() for tensor in named.values())
        for bucket in self._publisher.publish(named.items(), version, elements):
            cluster.rollout.update_weights(bucket).wait()
        self._publisher.release()


def train_with_old_weights(delay: int, arguments: list[str]) -> int:
    """`searchr1 train ARGUMENTS` with `OldWeights` in its loop."""
    from searchr1 import cli
    from searchr1.training import train, weight_sync

    with tempfile.TemporaryDirectory(prefix="searchr1-old-weights-") as folder:
        old_weights = OldWeights(delay, Path(folder))
        replaced = (weight_sync, "send_weights", old_weights.send), (train, "validate", old_weights.validate)
        for module, name, ours in replaced:
            if not hasattr(module, name):  # or nothing would stand in the way, and nobody would notice
                raise AttributeError(f"{module.__name__} has no {name} any more")
            setattr(module, name, ours)
        return cli.main(["train", *arguments])


def run_of(experiment: str, name: str, seed: int) -> Run:
    """One training."""
    arm = EXPERIMENTS[experiment][name]
    return Run(f"{experiment}-{name}-seed{seed}", COMMON, (*arm.overrides, f"runner.seed={seed}"), arm.command)


Results = dict[str, list[dict[str, Any]]]


def table(experiment: str, results: Results) -> str:
    """Markdown: held-out exact match and the mismatch of each arm, mean over seeds."""
    steps = [int(step) for step, _ in mean_curve(next(iter(results.values())), "val/exact_match")]
    heads = [*(f"step {step}" for step in steps), "KL", "effective share", "share bounded", "seeds"]
    lines = [f"| {experiment} | " + " | ".join(heads) + " |", "|" + " --- |" * (len(heads) + 1)]
    for name, runs in results.items():
        cells = [f"{value:.3f}" for _, value in mean_curve(runs, "val/exact_match")]
        for curve in ("mismatch/kl", "mismatch/effective_sample_size", "actor/correction_bounded"):
            cells.append(f"{statistics.mean(v for _, v in mean_curve(runs, curve)):.2g}" if runs[0][curve] else "")
        lines.append(f"| {EXPERIMENTS[experiment][name].title} | " + " | ".join([*cells, str(len(runs))]) + " |")
    return "\n".join(lines) + "\n"


def curves(experiment: str, results: Results) -> str:
    """SVG: a panel per measure, a line per arm, mean over seeds."""
    charts = []
    for title, curve in PANELS.items():
        lines = [Series(EXPERIMENTS[experiment][name].title, mean_curve(runs, curve)) for name, runs in results.items()]
        charts.append(Chart(title, lines))
    return drawing(charts, columns=2)


def main() -> int:
    if sys.argv[1:2] == [WITH_OLD_WEIGHTS]:
        return train_with_old_weights(int(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [(experiment, name) for experiment, arms in EXPERIMENTS.items() for name in arms]
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(EXPERIMENTS), metavar="NAME,…")
    parser.add_argument("--seeds", type=numbers, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/mismatch"))
    args = parser.parse_args()
    known = [*EXPERIMENTS, *("-".join(pair) for pair in every)]
    if unknown := [name for name in args.only if name not in known]:
        parser.error(f"--only: nothing is called {', '.join(unknown)}; there are {', '.join(known)}")
    folder: Path = args.out.resolve()
    chosen = [pair for pair in every if pair[0] in args.only or "-".join(pair) in args.only]
    failed = run_missing(folder, [run_of(*pair, seed) for seed in args.seeds for pair in chosen], CURVES)
    for experiment in dict.fromkeys(experiment for experiment, _ in chosen):
        results: Results = {}
        for name in EXPERIMENTS[experiment]:
            found = [run_of(experiment, name, seed).kept(folder) for seed in args.seeds]
            if runs := [result for result in found if result is not None]:
                results[name] = runs
        if results:
            text = table(experiment, results)
            (folder / f"{experiment}.md").write_text(text, encoding="utf-8")
            (folder / f"{experiment}.svg").write_text(curves(experiment, results), encoding="utf-8")
            print(f"\n{text}\n{folder / experiment}.svg")
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
