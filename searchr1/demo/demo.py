"""`searchr1 demo`, what run.sh calls: world, retrieval server, training, conversion, evaluation, report.

Every step is a command of its own, printed before it runs, so that a person can repeat any of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from searchr1.cluster.guardian import guarded
from searchr1.config.load import load_config
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.files.folder_lock import folder_lock
from searchr1.preflight.check_device import require_one_node
from searchr1.rollout.shared_memory import SHARED_MEMORY
from searchr1.shutdown import Stopped, ended_at_once
from searchr1.tracking.loggers import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples/searchr1/config"
TRAIN_CONFIG, EVAL_CONFIG = CONFIGS / "tiny-cpu.yaml", CONFIGS / "tiny-cpu-eval.yaml"
GPU_TRAIN_CONFIG, GPU_EVAL_CONFIG = CONFIGS / "tiny-gpu.yaml", CONFIGS / "tiny-gpu-eval.yaml"
COLD_START = ROOT / "examples/demo/cold_start"
NEW_WORLD_SEED = 77
PROGRAM = (sys.executable, "-m", "searchr1.cli")
SERVER_TIMEOUT_S = 60.0
POLL_SECONDS = 0.5
HOPS = ("one_hop", "two_hop", "three_hop")


@dataclass(frozen=True, slots=True)
class Server:
    """A retrieval server in a process of its own."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def require_running(self) -> None:
        """Raises:
        UserError: it has ended; nothing can be searched any more.
        """
        code = self.process.poll()
        if code is not None:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise UserError(
                f"the retrieval server (process {self.process.pid}) {how}, so the demo stops; start it again to go on. The "
                f"server's last words: {_last_words(self.log)}"
            )


def command(*arguments: object, env: dict[str, str] | None = None, server: Server | None = None) -> None:
    """Run a sub-command in a process of its own. What asks this process to stop is passed on to it.

    Args:
        arguments: of searchr1.
        env: variables on top of this process's.
        server: that the command needs.

    Raises:
        UserError: it failed, and what went wrong is above; or the server has ended.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ searchr1 {shlex.join(words)}", flush=True)
    process = subprocess.Popen([*PROGRAM, *words], env=os.environ | (env or {}))
    with ended_at_once(process.kill):
        try:
            while process.poll() is None:
                if server is not None:
                    server.require_running()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        except BaseException as error:
            process.send_signal(error.signum if isinstance(error, Stopped) else signal.SIGTERM)
            process.wait()
            raise
    if process.returncode:
        raise UserError(f"searchr1 {words[0]} ended with exit code {process.returncode}; see its message above")


@contextmanager
def retrieval_server(world: Path, log: Path) -> Iterator[str]:
    """A server on a free port for as long as the block runs. Yields its address.

    Raises:
        UserError: it did not come up.
    """
    with running_server(world, log) as server:
        yield server.address


@contextmanager
def running_server(world: Path, log: Path) -> Iterator[Server]:
    """A server on a free port for as long as the block runs.

    Raises:
        UserError: it did not come up.
    """
    address_file = world / "address"
    address_file.unlink(missing_ok=True)
    words = ["retrieval-server", "--retriever_name", "bm25", "--corpus_path", str(world / "corpus.jsonl")]
    words += ["--pages_path", str(world / "pages.jsonl"), "--port", "0", "--save-address-to", str(address_file)]
    print(f"\n$ searchr1 {shlex.join(words)} &", flush=True)
    with log.open("w", encoding="utf-8") as output:
        # Of a group of its own: Ctrl-C must not end it before the command that asks it.
        server = subprocess.Popen([*PROGRAM, *words], stdout=output, stderr=output, process_group=0)
    with ended_at_once(server.kill):
        try:
            deadline = time.monotonic() + SERVER_TIMEOUT_S
            while not address_file.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise UserError(f"the retrieval server did not start; its last words: {_last_words(log)}")
                time.sleep(0.05)
            print(log.read_text(encoding="utf-8").strip(), flush=True)
            yield Server(address_file.read_text(encoding="utf-8"), server, log)
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def _last_words(log: Path) -> str:
    return log.read_text(errors="replace", encoding="utf-8")[-500:].strip() or f"none (in {log})"


def summary(folder: Path) -> str:
    """What came of it, for people."""
    rows = [row for row in read_metrics(folder / "train/metrics.jsonl") if "val/exact_match" in row]
    exported = json.loads((folder / "eval/eval.json").read_text(encoding="utf-8"))
    columns = [("before training", rows[0]), (f"after {rows[-1]['step']} steps", rows[-1]), ("converted model", exported)]
    lines = ["held-out questions" + "".join(f"{name:>20}" for name, _ in columns)]
    for label, key in [("exact match", "val/exact_match"), *((f"  {h}", f"val/{h}/exact_match") for h in HOPS)]:
        lines.append(f"{label:<18}" + "".join(f"{row.get(key, float('nan')):>20.3f}" for _, row in columns))
    lines.append(f"{'searches/question':<18}" + "".join(f"{row['val/searches']:>20.2f}" for _, row in columns))
    return "\n".join(lines)


def machine_overrides(overrides: list[str]) -> list[str]:
    """Pick what an evaluation needs of the training's overrides: what the machine asks for."""
    return [override for override in overrides if override.startswith(("cluster.", "rollout.model.precision="))]


def configs(overrides: list[str]) -> tuple[Path, Path]:
    """Pick the YAMLs of training and evaluation: those for the GPU where there is one, unless an override says otherwise.

    Raises:
        UserError: there is a GPU, but it cannot be used and the user did not choose the CPU.
    """
    settings = dict(override.split("=", 1) for override in overrides if "=" in override)
    device = Device.detect(settings.get("cluster.device", "auto"))
    return (GPU_TRAIN_CONFIG, GPU_EVAL_CONFIG) if device.is_cuda else (TRAIN_CONFIG, EVAL_CONFIG)


def run(args: argparse.Namespace, train_config: Path, eval_config: Path) -> None:
    """Run the whole demo."""
    out: Path = args.out or Path(f"runs/demo-seed{args.seed}")
    with folder_lock(out, "--out", "searchr1 demo"):
        run_in(out, args, train_config, eval_config)


def run_in(out: Path, args: argparse.Namespace, train_config: Path, eval_config: Path) -> None:
    """Run it in a folder that no other process writes to."""
    started = time.perf_counter()
    world = out / "world"
    if not (world / "world.json").exists():
        command("demo-world", "--seed", args.seed, "--out", world)
    with running_server(world, out / "retrieval.log") as server:
        env = {"SEARCHR1_DEMO_DIR": str(out), "SEARCHR1_SEARCH_ADDR": server.address, "SEARCHR1_COLD_START": str(args.model)}
        overrides = [f"runner.seed={args.seed}", "runner.resume_dir=auto", *args.overrides]
        if args.steps is not None:
            overrides.append(f"runner.max_steps={args.steps}")
        command("train", train_config, *overrides, env=env, server=server)
        steps = sorted((out / "train/checkpoints").glob("global_step_*"), key=lambda path: int(path.name.rpartition("_")[2]))
        model = out / "model"
        shutil.rmtree(model, ignore_errors=True)  # a run that went on has a newer checkpoint
        kind = "mg2hf" if (steps[-1] / "actor/metadata.json").exists() else "fsdp2hf"
        command("convert", kind, "--checkpoint", steps[-1] / "actor", "--output", model)
        on_machine = machine_overrides(args.overrides)
        command("eval", eval_config, "runner.overwrite=True", *on_machine, env=env, server=server)
        if args.checks:
            off = ["runner.experiment_name=eval-search-off", "tools.search.dummy_mode=True", "runner.overwrite=True"]
            command("eval", eval_config, *off, *on_machine, env=env, server=server)
    if args.checks:
        other = out / "new-world" / "world"
        command("demo-world", "--seed", NEW_WORLD_SEED, "--out", other)
        with running_server(other, out / "retrieval-new-world.log") as other_server:
            env = {"SEARCHR1_DEMO_DIR": str(out / "new-world"), "SEARCHR1_SEARCH_ADDR": other_server.address}
            words = [f"rollout.model.model_path={model}", "runner.overwrite=True", *on_machine]
            command("eval", eval_config, *words, env=env, server=other_server)
    command("report", out / "train")
    print(f"\n{summary(out)}\n")
    if args.checks:
        for label, path in (("search off", "eval-search-off"), (f"world {NEW_WORLD_SEED}", "new-world/eval")):
            metrics = json.loads((out / path / "eval.json").read_text(encoding="utf-8"))
            print(f"exact match, {label}: {metrics['val/exact_match']:.3f}")
    print(f"model   {model}\ntable   {out / 'eval/eval.json'}\npage    {out / 'train/report.html'}")
    print(f"everything took {(time.perf_counter() - started) / 60:.1f} minutes")


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    parser = argparse.ArgumentParser(
        prog="run.sh",
        description="A small language model learns to search a fictional encyclopedia: on the first GPU where there is one, "
        "else on a CPU, in 5 to 12 minutes on two idle cores. A second run goes on where the first one stopped.",
    )
    parser.add_argument("--steps", type=int, help="training steps (default: 40; 2 for the impatient)")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the training (default 0)")
    parser.add_argument("--out", type=Path, help="folder for everything (default runs/demo-seedSEED)")
    parser.add_argument("--model", type=Path, default=COLD_START, help="model to start from")
    parser.add_argument("--checks", action="store_true", help=f"also evaluate without search, and on world {NEW_WORLD_SEED}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the training's YAML")
    args = parser.parse_args(argv)
    train_config, eval_config = configs(args.overrides)
    require_one_node(load_config(train_config, args.overrides))  # a slip is reported now, not after the world is made
    with guarded([SHARED_MEMORY]):
        run(args, train_config, eval_config)
    return 0
