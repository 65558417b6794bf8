"""How much of the engine's own throughput an evaluation keeps, on a CPU, from the first question to the last row on disk.

    python benchmarks/evaluation.py [--questions 2000] [--rounds 3] [--model examples/demo/cold_start] [--out results.json]

A round evaluates questions about the demo world as `searchr1 eval` does (Ray groups, agent loop, a BM25 server over HTTP,
reward group, ledger) and records what the engine was asked. The same requests (prompts, and exactly as many tokens as were
sampled, stop strings on) then go to an engine of this process with the same settings, all of them at once, first turns
first, so that it never waits. Both engines begin a round with an empty prefix cache or with questions they have not seen.
Rounds ask different questions; what is reported is each round's ratio and their median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from searchr1.device import Device

DEVICE = Device.detect("cpu")
# Before torch is imported.
os.environ.update(DEVICE.worker_env("rollout"))
# Ray lowers its workers' priority; on a machine with other work the two engines would then not be served alike.
os.environ.setdefault("RAY_worker_niceness", "0")

import numpy as np  # noqa: E402

from searchr1.agent.settings import GenerateParams  # noqa: E402
from searchr1.agent.trajectory import Trajectory  # noqa: E402
from searchr1.cluster.launch import EvaluationCluster, evaluation_cluster  # noqa: E402
from searchr1.config.load import load_config  # noqa: E402
from searchr1.config.schema import Config  # noqa: E402
from searchr1.demo.demo import COLD_START, CPU_RECIPES  # noqa: E402
from searchr1.demo.files import jsonl_row, write_jsonl, write_world  # noqa: E402
from searchr1.demo.processes import retrieval_server  # noqa: E402
from searchr1.demo.questions import make_questions  # noqa: E402
from searchr1.demo.world import make_world  # noqa: E402
from searchr1.evaluation.evaluate import answer  # noqa: E402
from searchr1.evaluation.tasks import begin, evaluation_path, load_questions, open_tasks  # noqa: E402
from searchr1.files.folder_lock import folder_lock  # noqa: E402
from searchr1.rollout.engine import Engine  # noqa: E402
from searchr1.rollout.settings import EngineSettings  # noqa: E402
from searchr1.tracking.run_path import NAMED_BY  # noqa: E402

WORLD = 0


def requests_of(trajectory: Trajectory, params: GenerateParams) -> list[tuple[list[int], GenerateParams]]:
    """What the engine was asked for one attempt: a prompt and a length for each turn."""
    ids = [*trajectory.sample.prompt_ids, *trajectory.response_ids.tolist()]
    found = []
    position = len(trajectory.sample.prompt_ids)
    for turn in trajectory.turns:
        length = turn.policy_tokens
        fixed = replace(params, max_new_tokens=length, min_new_tokens=length, seed=1)
        found.append((ids[:position], fixed))
        position += length + turn.tool_tokens
    return found


def evaluate_once(cluster: EvaluationCluster, config: Config) -> tuple[float, list[Trajectory], float]:
    """Seconds, attempts, and the share of the time in which the evaluation's engine was stepping."""
    questions = load_questions(config)
    folder = evaluation_path(config)
    (task,) = open_tasks(config, folder, questions)
    begin(config, folder, [task])
    seen: list[Trajectory] = []
    append = task.ledger.append

    def record(trajectories: list[Trajectory]) -> None:
        seen.extend(trajectories)
        append(trajectories)

    task.ledger.append = record  # type: ignore[method-assign, assignment]
    started = time.perf_counter()
    with folder_lock(folder, NAMED_BY, "benchmarks/evaluation.py") as lock:
        stats = answer(lock, cluster, task, task.pending, config)
    seconds = time.perf_counter() - started
    task.ledger.close()
    return seconds, seen, stats.engine_busy_share


async def replay(engine: Engine, turns: list[list[tuple[list[int], GenerateParams]]]) -> float:
    """Seconds for all requests at once."""
    await engine.reset_prefix_cache()
    longest = max(map(len, turns))
    ordered = [one[k] for k in range(longest) for one in turns if k < len(one)]
    started = time.perf_counter()
    await asyncio.gather(*(engine.generate(prompt, params) for prompt, params in ordered))
    return time.perf_counter() - started


async def rounds(arguments: argparse.Namespace, folder: Path, address: str) -> list[dict[str, Any]]:
    """All rounds, the two ways next to each other."""
    os.environ.update(SEARCHR1_DEMO_DIR=str(folder), SEARCHR1_SEARCH_ADDR=address)
    overrides = [f"rollout.model.model_path={arguments.model}", "runner.logger.logger_backends=[]"]
    config = load_config(CPU_RECIPES.eval, overrides)
    engine = await Engine.start(arguments.model, DEVICE, EngineSettings.from_config(config))
    world = make_world(WORLD)
    found = []
    try:
        with evaluation_cluster(config, DEVICE) as cluster:
            for number in range(arguments.rounds):
                asked = make_questions(world, "train", arguments.questions, 100 + number)
                path = folder / f"questions{number}.jsonl"
                write_jsonl(path, (jsonl_row(question, index) for index, question in enumerate(asked)))
                data = replace(config.data, val_data_paths=[str(path)])
                one = replace(config, data=data, runner=replace(config.runner, experiment_name=f"round{number}"))
                seconds, trajectories, busy = await asyncio.to_thread(evaluate_once, cluster, one)
                sampling = replace(GenerateParams(max_new_tokens=1), temperature=0.0, stop=("</search>", "</answer>"))
                turns = [requests_of(trajectory, sampling) for trajectory in trajectories]
                alone = await replay(engine, turns)
                tokens = int(np.sum([trajectory.policy_length for trajectory in trajectories]))
                row = {
                    "questions": len(trajectories),
                    "searches": sum(trajectory.searches for trajectory in trajectories),
                    "tokens": tokens,
                    "evaluation_seconds": seconds,
                    "engine_alone_seconds": alone,
                    "ratio": alone / seconds,
                    "engine_busy": busy,
                }
                found.append(row)
                print(
                    f"round {number + 1}: {tokens} tokens; evaluation {seconds:.1f} s ({tokens / seconds:.0f} tok/s, "
                    f"{len(trajectories) / seconds:.1f} questions/s), engine alone {alone:.1f} s "
                    f"({tokens / alone:.0f} tok/s), ratio {alone / seconds:.2f}, engine busy {busy:.2f}",
                    flush=True,
                )
    finally:
        await engine.close()
    return found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="An evaluation's throughput as a share of its engine's own.")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=str(COLD_START))
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(WORLD, folder / "world")
        with retrieval_server(folder / "world", folder / "retrieval.log") as server:
            found = asyncio.run(rounds(arguments, folder, server.address))
    median = statistics.median(row["ratio"] for row in found)
    print(f"median ratio {median:.2f} over {len(found)} rounds")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"median_ratio": median, "rounds": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
