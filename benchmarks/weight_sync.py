"""How fast do weights get from a trainer's process into a reader's? Shared buffers beside files of safetensors.

    python benchmarks/weight_sync.py [--shape 0.5b|3b|7b] [--dtype bfloat16|float32] [--device cpu|cuda] [--rounds 5]

Two processes. The trainer has tensors of the shapes of Qwen2.5; the reader has parameters of the same shapes on the same
kind of device, and copies what comes into them; both ways in turns, the next bucket written while one is read. `files` is
what the project did before: each bucket copied to the host, written with safetensors into /dev/shm, mapped by the reader and
deleted. The first round of `buffers` makes, maps and (on a GPU) pins the buffers, and is reported by itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from searchr1.rollout.shared_memory import weight_directory
from searchr1.rollout.weights import WeightPublisher, WeightReader, bucket_size

# hidden, feed-forward, layers, key-value width, tied
SHAPES = {
    "0.5b": (896, 4864, 24, 128, True),
    "3b": (2048, 11008, 36, 256, True),
    "7b": (3584, 18944, 28, 512, False),
}
VOCABULARY = 151936


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2.5."""
    hidden, ffn, layers, kv, tied = SHAPES[name]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for projection, rows in (("q", hidden), ("k", kv), ("v", kv)):
            found[f"{prefix}self_attn.{projection}_proj.weight"] = (rows, hidden)
            found[f"{prefix}self_attn.{projection}_proj.bias"] = (rows,)
        found[prefix + "self_attn.o_proj.weight"] = (hidden, hidden)
        found[prefix + "mlp.gate_proj.weight"] = found[prefix + "mlp.up_proj.weight"] = (ffn, hidden)
        found[prefix + "mlp.down_proj.weight"] = (hidden, ffn)
        found[prefix + "input_layernorm.weight"] = found[prefix + "post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not tied:
        found["lm_head.weight"] = (VOCABULARY, hidden)
    return found


def write_files(named: Iterable[tuple[str, Tensor]], folder: Path, size: int) -> Iterator[str]:
    """The way before: no more than two files at a time."""
    bucket: dict[str, Tensor] = {}
    number = held = 0

    def write() -> str:
        (folder / f"{number - 2}").unlink(missing_ok=True)
        save_file(bucket, str(folder / f"{number}"))
        return str(folder / f"{number}")

    for name, tensor in named:
        bucket[name] = tensor.to("cpu").contiguous()
        held += tensor.nbytes
        if held >= size:
            yield write()
            bucket, held, number = {}, 0, number + 1
    if bucket:
        yield write()


def read_file(path: str) -> Iterator[tuple[str, Tensor]]:
    """Its tensors, mapped."""
    with safe_open(path, framework="pt", device="cpu") as handle:
        for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
            yield name, handle.get_tensor(name)


def read_all(pipe: Connection, shape: str, dtype: torch.dtype, device: str) -> None:
    """The reader's process: answer each bucket when it is loaded; "sum" with a sum per tensor, None ends."""
    parameters = {name: torch.zeros(size, dtype=dtype, device=device) for name, size in shapes(shape).items()}
    reader = WeightReader(torch.device(device))
    pipe.send("ready")
    while (message := pipe.recv()) is not None:
        if message == "sum":
            pipe.send({name: checksum(tensor) for name, tensor in parameters.items()})
            continue
        if not isinstance(message, str) and message.first:
            reader.start()
        for name, tensor in read_file(message) if isinstance(message, str) else reader.read(message):
            parameters[name].copy_(tensor)
        if device == "cuda":
            torch.cuda.synchronize()
        pipe.send(reader.take_warnings())


def checksum(tensor: Tensor) -> int:
    """Of the bits."""
    width = torch.int16 if tensor.element_size() == 2 else torch.int32
    return int(tensor.view(width).to(torch.int64).sum())


def send(pipe: Connection, buckets: Iterable[Any]) -> float:
    """Seconds until the reader has everything."""
    began = time.perf_counter()
    waiting = False
    for bucket in buckets:
        if waiting:
            show(pipe.recv())
        pipe.send(bucket)
        waiting = True
        show(getattr(bucket, "warnings", ()))
    show(pipe.recv())
    return time.perf_counter() - began


def show(warnings: Iterable[str]) -> None:
    """Print them."""
    for text in warnings:
        print("warning:", text, flush=True)


def main() -> None:
    """Measure both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    reader = context.Process(target=read_all, args=(other, args.shape, dtype, args.device), daemon=True)
    reader.start()
    named = {name: torch.randn(size, dtype=dtype, device=args.device) for name, size in shapes(args.shape).items()}
    elements = sum(tensor.numel() for tensor in named.values())
    gigabytes = elements * dtype.itemsize / 1e9
    size = bucket_size(elements, dtype)
    assert pipe.recv() == "ready"
    root = weight_directory(2 * size, Path(tempfile.gettempdir()))
    publisher = WeightPublisher(root, size)
    seconds: dict[str, list[float]] = {"files": [], "buffers": []}
    for number in range(args.rounds + 1):
        for tensor in named.values():
            tensor.add_(1)
        if args.device == "cuda":
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory(dir=root) as folder:
            seconds["files"].append(send(pipe, write_files(named.items(), Path(folder), size)))
        for tensor in named.values():
            tensor.add_(1)
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds["buffers"].append(send(pipe, publisher.publish(named.items(), number, elements)))
        publisher.release()
        pipe.send("sum")
        if pipe.recv() != {name: checksum(tensor) for name, tensor in named.items()}:
            raise SystemExit("the reader has other numbers than the trainer")
    pipe.send(None)
    reader.join()
    print(f"{args.shape} {args.dtype} on {args.device}, {gigabytes:.2f} GB in buckets of {size >> 20} MiB through {root}")
    medians = {}
    for way, values in seconds.items():
        medians[way] = statistics.median(values[1:])
        spread = f"{min(values[1:]):.2f} to {max(values[1:]):.2f}"
        print(f"{way:8} {medians[way]:.2f} s ({spread}), {gigabytes / medians[way]:.2f} GB/s; the first {values[0]:.2f} s")
    print(f"files / buffers: {medians['files'] / medians['buffers']:.2f}")


if __name__ == "__main__":
    main()
