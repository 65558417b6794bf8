"""What the checksums of a checkpoint cost: of saving, and of resuming.

    python benchmarks/checkpoint_sums.py [--gib 2] [--repeats 5] [--pause 2] [--folder DIR] [--out results.json]

A checkpoint of random fp32 tensors is written the way a run writes one (`RunFolder.save` and `finish_save`, PyTorch's
distributed checkpoint, fsync), in turns with sums and with sizes alone, each followed by `--pause` seconds (what a run does
between the two: waking the engines and handing them their weights) and without a pause. What a run waits for is the time in
`save` and in `finish_save`; the pause is not counted. Then the checkpoint is verified, with its files in the page cache and
dropped from it. Beside each time is the processor time of this process, its threads together, which says more than the clock
where other programs run too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp

from searchr1.agent.trajectory import Sample
from searchr1.checkpoints.manifest import verify_checkpoint
from searchr1.config.schema import Config
from searchr1.data.loader import PromptLoader
from searchr1.files.checksums import FileSum, files_below
from searchr1.training.run_folder import RunFolder

TENSOR_BYTES = 64 << 20


class Actor:
    """A worker group of one rank, in this process."""

    def __init__(self, gib: float) -> None:
        count = max(1, round(gib * (1 << 30) / TENSOR_BYTES))
        self.state = {"model": {f"layer.{number}": torch.rand(TENSOR_BYTES // 4) for number in range(count)}}

    def save(self, folder: Path, in_background: bool) -> Any:
        """Write a checkpoint."""
        (folder / "hf").mkdir(parents=True)
        dcp.save(self.state, checkpoint_id=folder)
        return SimpleNamespace(wait=lambda timeout_s: [])


def sizes_of(folder: Path, names: list[Path] | None = None) -> dict[str, FileSum]:
    """What `take_all` returns, without reading the files."""
    found = list(files_below(folder)) if names is None else names
    return {name.as_posix(): FileSum((folder / name).stat().st_size, "0" * 32) for name in found}


@contextmanager
def without_sums() -> Iterator[None]:
    """As before there were any."""
    with (
        patch("searchr1.training.run_folder.take_all", sizes_of),
        patch("searchr1.checkpoints.manifest.take_all", sizes_of),
    ):
        yield


def save(config: Config, actor: Actor, step: int, pause_s: float) -> tuple[float, float]:
    """Return the seconds that a run waits for a checkpoint, and those of the processor."""
    loader = PromptLoader([Sample("s/0", 0, [1], "Q", ["a"])], 1, seed=1, shuffle=False, max_epochs=9)
    run = RunFolder.open(config, loader)
    cluster: Any = SimpleNamespace(actor=actor, critic=None)
    used = time.process_time()
    start = time.perf_counter()
    run.save(cluster, loader, step)
    waited = time.perf_counter() - start
    time.sleep(pause_s)
    start = time.perf_counter()
    run.finish_save()
    return waited + time.perf_counter() - start, time.process_time() - used


def drop_from_cache(folder: Path) -> None:
    """Let the system forget the files' contents, which are on the disk already."""
    for name in files_below(folder):
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def verify(folder: Path) -> tuple[float, float]:
    """Return the seconds that it takes, and those of the processor."""
    start, used = time.perf_counter(), time.process_time()
    verify_checkpoint(folder)
    return time.perf_counter() - start, time.process_time() - used


def measure(root: Path, gib: float, repeats: int, pause_s: float) -> dict[str, Any]:
    """Everything, in turns; medians with the smallest and the largest."""
    config = Config()
    config.runner.output_dir, config.runner.overwrite, config.runner.keep_checkpoints = str(root), True, 1
    actor = Actor(gib)
    times: dict[str, list[tuple[float, float]]] = {}
    save(config, actor, 1, 0)  # the first of all waits for imports
    for number in range(repeats):
        for pause in (0.0, pause_s):
            between = f"{pause:g} s between" if pause else "nothing between"
            times.setdefault(f"save with sums, {between}", []).append(save(config, actor, 4 * number + 2, pause))
            with without_sums():
                times.setdefault(f"save without, {between}", []).append(save(config, actor, 4 * number + 3, pause))
    save(config, actor, 4 * repeats + 2, 0)
    folder = root / config.runner.experiment_name / f"checkpoints/global_step_{4 * repeats + 2}"
    for _ in range(repeats):
        times.setdefault("verify, cached", []).append(verify(folder))
        drop_from_cache(folder)
        times.setdefault("verify, from the disk", []).append(verify(folder))
    size = sum((folder / name).stat().st_size for name in files_below(folder))
    rows = {}
    for name, found in times.items():
        waited, used = zip(*found, strict=True)
        rows[name] = {
            "median_s": statistics.median(waited),
            "least_s": min(waited),
            "most_s": max(waited),
            "cpu_s": statistics.median(used),
        }
    return {"bytes": size, "repeats": repeats, "cores": os.cpu_count(), "times": rows}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint (default: 2)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between save and finish_save (default: 2)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's for temporary files)")
    parser.add_argument("--out", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="checkpoint-sums-") as root:
        found = measure(Path(root), args.gib, args.repeats, args.pause)
    print(f"{found['bytes'] / 1e9:.2f} GB, {found['repeats']} times each, {found['cores']} cores")
    for name, row in found["times"].items():
        speed = found["bytes"] / row["median_s"] / 1e9
        spread = f"({row['least_s']:.2f} to {row['most_s']:.2f})"
        print(f"{name:<34} {row['median_s']:7.2f} s {spread:<18} {speed:6.2f} GB/s  {row['cpu_s']:6.2f} s of processor")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
