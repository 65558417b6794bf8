"""`searchr1 eval`, and the evaluation inside a training run: every row, greedily, per data source."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.config.check import require_valid
from searchr1.config.load import load_config
from searchr1.config.schema import Config
from searchr1.data.loader import eval_batches
from searchr1.device import Device
from searchr1.runner.collect import collect
from searchr1.runner.data import load_data
from searchr1.runner.groups import Groups, launch
from searchr1.runner.run_folder import RunFolder
from searchr1.tracking.metrics import eval_metrics, eval_table
from searchr1.tracking.run_log import RunLog


def evaluate(groups: Groups, samples: list[Sample], config: Config, log: RunLog, step: int) -> dict[str, float]:
    """Answer every question once and log the result. Returns the metrics, `val/<data source>/<name>`."""
    trajectories: list[Trajectory] = []
    batch_size = config.data.val_rollout_batch_size or len(samples)
    for number, batch in enumerate(eval_batches(samples, batch_size)):
        answered = collect(
            groups,
            batch,
            step=step,
            mode="eval",
            group_size=1,
            seed=config.runner.seed + number,
            timeout_s=config.runner.step_timeout_s,
        )
        trajectories.extend(answered.trajectories)
    metrics = eval_metrics(trajectories)
    log.evaluation(step, trajectories, metrics)
    return metrics


def run(config: Config) -> tuple[dict[str, float], Path]:
    """Evaluate the model that `config` names. Returns the metrics and the run's folder, which also holds them."""
    device = Device.detect(config.cluster.device)
    samples = load_data(config, training=False).val
    folder = RunFolder.open(config)
    with launch(config, device) as groups:
        with RunLog(folder.path, config, first_step=0, total_steps=0) as log:
            metrics = evaluate(groups, samples, config, log, step=0)
    (folder.path / "eval.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics, folder.path


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    parser = argparse.ArgumentParser(prog="searchr1 eval", description="Evaluate a model as a YAML describes.")
    parser.add_argument("config", help="the YAML, for instance examples/searchr1/config/tiny-cpu-eval.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance rollout.model.model_path=PATH")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)
    require_valid(config, for_training=False)
    metrics, folder = run(config)
    print(eval_table(metrics))
    print(f"results: {folder}")
    return 0
