"""Speed and memory of `searchr1 convert`, beside a plain copy of the same bytes.

    python benchmarks/convert.py [--shape 3b] [--repeats 3] [--folder DIR] [--verify] [--out results.json]

A random bf16 model of a published shape is written tensor by tensor; then, in turns: its files are copied, `hf2mg` makes a
Megatron checkpoint of them, those files are copied, `mg2hf` makes a Hugging Face folder of them, which must equal the
first bit by bit. Every step runs in a process of its own, which reports its peak resident memory (getrusage: pages of
mapped files count) and what of it the imports took; their time (some seconds) is left out. Copies and conversions end
with fsync. The page cache is as the step before left it. glibc's allocator runs with its defaults: env.sh makes it keep
freed memory, which here costs up to one more tensor.

`3b` needs 25 GB of disk; `tiny` is for a test.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "3b": {  # Qwen2.5-3B
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "7b": {  # Qwen2.5-7B
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 32000, "tie_word_embeddings": True,
    },
}  # fmt: skip
MIB = 1 << 20


def make_model(folder: Path, shape: str) -> None:
    """Random bf16 weights of a Qwen2, one tensor in memory at a time."""
    import torch
    from transformers import AutoConfig

    from searchr1.checkpoints.hf_writer import SHARD_BYTES, stream_weights
    from searchr1.checkpoints.mapping import hugging_face_shapes
    from searchr1.checkpoints.model_shape import read_megatron_shape
    from searchr1.checkpoints.safetensors import TensorSpec

    folder.mkdir()
    config = AutoConfig.for_model("qwen2", dtype="bfloat16", **SHAPES[shape])
    config.save_pretrained(folder)
    shapes = hugging_face_shapes(read_megatron_shape(folder)[0])
    specs = [TensorSpec(name, size, torch.bfloat16) for name, size in shapes.items()]
    # Random numbers are slow to make: one block of them, of a prime length, begun somewhere else for every tensor.
    block = torch.randn(7_919_117, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def tensors() -> Any:
        for number, (name, size) in enumerate(shapes.items()):
            count = torch.Size(size).numel()
            start = number * 104_729 % len(block)
            whole = torch.cat([block[start:], *[block] * (count // len(block)), block])[:count]
            yield name, whole.view(size)

    stream_weights(specs, tensors(), folder, SHARD_BYTES)


def copy(source: Path, target: Path) -> None:
    """Plain reads and writes."""
    target.mkdir()
    for file in (path for path in source.iterdir() if path.is_file()):
        with file.open("rb", buffering=0) as reader, (target / file.name).open("wb", buffering=0) as writer:
            while piece := reader.read(16 * MIB):
                writer.write(piece)
            os.fsync(writer.fileno())


def child(step: str, source: Path, target: Path, shape: str, verify: bool) -> None:
    """One step; prints a line of JSON."""
    if step != "copy":
        from searchr1.checkpoints.hf2mg import MegatronOptions, hf2mg
        from searchr1.checkpoints.model_shape import read_megatron_shape
        from searchr1.checkpoints.to_hf import Options, mg2hf

        if step != "make":
            read_megatron_shape(source / "hf" if step == "mg2hf" else source)  # imports what reading a configuration needs
    imports = _peak_mib()
    start, cpu = time.perf_counter(), _cpu_seconds()
    if step == "make":
        make_model(target, shape)
    elif step == "copy":
        copy(source, target)
    elif step == "hf2mg":
        hf2mg(source, target, MegatronOptions(verify=verify))
    else:
        mg2hf(source, target, None, Options(verify=verify))
    seconds = time.perf_counter() - start
    cpu = _cpu_seconds() - cpu
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mib": _peak_mib(), "imports_mib": imports}))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def run(step: str, source: Path, target: Path, shape: str, verify: bool = False) -> dict[str, float]:
    """A step in a process of its own; this one stays small, since a child's peak counts its parent's memory."""
    command = [sys.executable, __file__, "--child", step, str(source), str(target), shape, str(int(verify))]
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def same_weights(left: Path, right: Path) -> bool:
    """Whether all weight files are equal byte by byte."""
    names = sorted(path.name for path in left.glob("*.safetensors"))
    command = ["cmp", "-s"]
    return names == sorted(path.name for path in right.glob("*.safetensors")) and all(
        subprocess.run([*command, str(left / name), str(right / name)], check=False).returncode == 0 for name in names
    )


def measure(folder: Path, shape: str, repeats: int, verify: bool) -> dict[str, Any]:
    """All steps, in turns. Returns medians by step."""
    run("make", folder, folder / "hf", shape)
    size = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
    runs: dict[str, list[dict[str, float]]] = {"copy": [], "hf2mg": [], "mg2hf": []}
    for _ in range(repeats):
        for step, source, target in (("hf2mg", "hf", "mg"), ("mg2hf", "mg", "out")):
            runs["copy"].append(run("copy", folder / source, folder / "copy", shape))
            shutil.rmtree(folder / "copy")
            runs[step].append(run(step, folder / source, folder / target, shape, verify))
        if not same_weights(folder / "hf", folder / "out"):
            sys.exit("the model that came back differs")
        shutil.rmtree(folder / "mg")
        shutil.rmtree(folder / "out")
    steps = {
        step: {key: statistics.median(one[key] for one in found) for key in found[0]}
        | {
            "slowest": max(one["seconds"] for one in found),
            "mb_per_s": size / 1e6 / statistics.median(o["seconds"] for o in found),
        }
        for step, found in runs.items()
    }
    return {"shape": shape, "bytes": size, "repeats": repeats, "verify": verify, "steps": steps}


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{result['shape']}: {result['bytes'] / 1e9:.2f} GB bf16, median of {result['repeats']}"
        + (", conversions with --verify" if result["verify"] else ""),
        f"{'step':8}{'seconds':>10}{'slowest':>10}{'CPU s':>8}{'MB/s':>8}{'of a copy':>12}{'peak MiB':>10}{'imports':>10}",
    ]
    copied = result["steps"]["copy"]["seconds"]
    for step, found in result["steps"].items():
        lines.append(
            f"{step:8}{found['seconds']:10.1f}{found['slowest']:10.1f}{found['cpu_seconds']:8.1f}{found['mb_per_s']:8.0f}"
            f"{found['seconds'] / copied:11.2f}x{found['peak_mib']:10.0f}{found['imports_mib']:10.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--child"]:
        step, source, target, shape, verify = sys.argv[2:]
        child(step, Path(source), Path(target), shape, verify == "1")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="3b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="a disk with room (default: the temporary folder)")
    parser.add_argument("--verify", action="store_true", help="measure conversions with --verify")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(Path(folder), args.shape, args.repeats, args.verify)
    print(table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
