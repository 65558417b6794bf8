"""Training speed of both backends beside a plain transformers step, on the same packed trajectories.

    python benchmarks/train_throughput.py                                    Qwen2.5-0.5B and 3B shapes, needs a GPU
    python benchmarks/train_throughput.py --shapes tiny --precision fp32     to see that it runs, on anything

Weights are random, sequences as long as in the Search-R1 recipe (prompt 300 to 1,500 tokens, at most 7,096 in all, about
half of the response sampled by the policy). Every measurement is a process of its own; the first steps warm up. Model
FLOPs are those of the architecture (forward and backward, without recomputation; causal attention counts the half that is
computed: 6 L H times the sum of squared lengths; the output layer counts where logits are needed: policy tokens). "MFU 6NT"
is the rule of thumb 6 N T + 12 L H times the sum of squared lengths, for comparison with published numbers. Peak memory is
torch's on a GPU, after the warm-up. `--profile` adds what one micro-batch consists of, and where the host waits for the GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from profiling import profile

if TYPE_CHECKING:
    from searchr1.agent.trajectory import Trajectory
    from searchr1.device import Device

    Step = Callable[[list[Trajectory]], None]

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 2048},
    "qwen2.5-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                     "num_key_value_heads": 2, "vocab_size": 151936},
    "qwen2.5-3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                   "num_key_value_heads": 2, "vocab_size": 151936},
}  # fmt: skip
BACKENDS = ("transformers", "fsdp", "fsdp-unfused", "fsdp-compiled", "megatron")
"""Of fsdp also without Liger's kernels (which it takes where they are installed), and with compiled layers instead."""
DEFAULT_BACKENDS = ("transformers", "fsdp", "megatron")
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16, by what is in the GPU's name."""


def make_model(shape: str, folder: Path) -> None:
    """A folder with random weights in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=32768)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def make_trajectories(count: int, vocabulary: int, longest: int) -> list[Any]:
    """The recipe's lengths, from a fixed seed."""
    from searchr1.agent.trajectory import Sample, Trajectory

    rng = np.random.default_rng(0)
    found = []
    for index in range(count):
        prompt = min(int(rng.integers(300, 1501)), longest // 3)
        response = int(np.clip(rng.lognormal(7.3, 0.5), 64, longest - prompt))
        mask = (np.arange(response) // 250) % 2 == 0  # the policy and the retrieved text take turns
        found.append(
            Trajectory(
                sample=Sample(f"b/{index}", index, rng.integers(0, vocabulary, prompt).tolist(), "", []),
                rollout_id=0,
                response_ids=rng.integers(0, vocabulary, response).astype(np.int32),
                loss_mask=mask,
                rollout_logprobs=np.where(mask, -10, 0).astype(np.float32),
                turns=[],
                stop="answer",
            )
        )
    return found


def prepare_policy(args: argparse.Namespace, device: Device) -> Step:
    """A step on one of our backends."""
    from searchr1.config.schema import Config
    from searchr1.learner.policy import Policy

    config = Config()
    config.rollout.model.model_path = str(args.model)
    config.runner.max_tokens_per_mbs = args.max_tokens
    config.algorithm.kl_beta = 0.0
    config.actor.training_backend = args.backend.split("-")[0]
    config.actor.model.precision = args.precision
    config.actor.fsdp.compile = args.backend == "fsdp-compiled"
    config.actor.fsdp.liger = None if args.backend == "fsdp" else False
    if args.recompute and config.actor.training_backend == "fsdp":
        config.actor.model.gradient_checkpointing = True
    elif args.recompute:
        config.actor.model.recompute_granularity = "full"
    policy = Policy.start(config, device)

    def step(trajectories: list[Trajectory]) -> None:
        policy.train_step(trajectories, [1.0 if i % 2 else -1.0 for i in range(len(trajectories))], [0] * len(trajectories))

    return step


def prepare_transformers(args: argparse.Namespace, device: Device) -> Step:
    """The same loss as people write it: padded batches of the same number of tokens, all logits, torch's AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    place = device.torch_device()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").to(place)
    if args.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(trajectories: list[Trajectory]) -> None:
        tokens = sum(int(t.loss_mask.sum()) for t in trajectories)
        for rows in padded_batches(trajectories, args.max_tokens):
            longest = max(length(t) for t in rows)
            ids, attention = (
                torch.zeros(len(rows), longest, dtype=torch.long),
                torch.zeros(len(rows), longest, dtype=torch.long),
            )
            mask = torch.zeros(len(rows), longest)
            for row, t in enumerate(rows):
                ids[row, : length(t)] = torch.tensor([*t.sample.prompt_ids, *t.response_ids.tolist()])
                mask[row, len(t.sample.prompt_ids) : length(t)] = torch.tensor(t.loss_mask)
                attention[row, : length(t)] = 1
            ids, mask, attention = ids.to(place), mask.to(place), attention.to(place)
            with torch.autocast(place.type, dtype, enabled=dtype != torch.float32):
                logits = model(ids, attention_mask=attention).logits[:, :-1]
            logprobs = torch.gather(logits.float().log_softmax(-1), -1, ids[:, 1:, None])[..., 0]
            (-(logprobs * mask[:, 1:]).sum() / tokens).backward()
            del logits, logprobs
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def padded_batches(trajectories: list[Trajectory], max_tokens: int) -> list[list[Trajectory]]:
    """Sequences of like length together, as many as fit with their padding; one that does not fit stands alone."""
    batches: list[list[Trajectory]] = []
    for trajectory in sorted(trajectories, key=length, reverse=True):
        if not batches or (len(batches[-1]) + 1) * length(batches[-1][0]) > max_tokens:
            batches.append([])
        batches[-1].append(trajectory)
    return batches


def length(trajectory: Trajectory) -> int:
    """Prompt and response tokens."""
    return len(trajectory.sample.prompt_ids) + len(trajectory.response_ids)


def one_micro_batch(trajectories: list[Trajectory], max_tokens: int) -> list[Trajectory]:
    """As many of the first as fit together."""
    found: list[Trajectory] = []
    for trajectory in trajectories:
        if sum(map(length, found)) + length(trajectory) <= max_tokens:
            found.append(trajectory)
    return found


def measure(args: argparse.Namespace) -> None:
    """In a process of its own: writes one JSON object."""
    import torch
    from transformers import AutoConfig

    from searchr1.device import Device
    from searchr1.learner.stats import training_flops

    trajectories = make_trajectories(args.trajectories, SHAPES[args.shape]["vocab_size"], args.longest)
    device = Device.detect("auto")
    prepare = prepare_transformers if args.backend == "transformers" else prepare_policy
    step = prepare(args, device)
    while True:  # all logits of all tokens in fp32 may not fit: the plain step then takes smaller batches, and says so
        try:
            step(trajectories)
            break
        except torch.OutOfMemoryError:
            if args.backend != "transformers" or args.max_tokens < 1024:
                raise
        args.max_tokens //= 2
        torch.cuda.empty_cache()
    seconds = []
    for number in range(1, args.steps):
        if number == args.warmup and device.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        device.synchronize()
        started = time.perf_counter()
        step(trajectories)
        device.synchronize()
        seconds.append(time.perf_counter() - started)
    peak_bytes = device.memory().peak_bytes
    median = float(np.median(seconds[max(0, args.warmup - 1) :]))
    lengths = [length(t) for t in trajectories]
    config = AutoConfig.from_pretrained(args.model)
    flops = training_flops(config, lengths, sum(int(t.loss_mask.sum()) for t in trajectories))
    name = torch.cuda.get_device_name() if device.is_cuda else "CPU"
    peak = next((value * 1e12 for key, value in PEAK_TFLOPS.items() if key in name), None)
    row = {
        "shape": args.shape, "backend": args.backend, "device": name, "torch": torch.__version__, "tokens": sum(lengths),
        "max_tokens": args.max_tokens, "seconds": median, "seconds_of_steps": seconds,
        "tokens_per_second": sum(lengths) / median, "tflops": flops / median / 1e12,
        "mfu": flops / median / peak if peak else None,
        "mfu_6nt": dense_flops(config, lengths) / median / peak if peak else None,
        "peak_gib": peak_bytes / 2**30,
    }  # fmt: skip
    Path(args.result).write_text(json.dumps(row), encoding="utf-8")
    if args.profile:
        part = one_micro_batch(trajectories, args.max_tokens)
        print(f"profile of {args.shape} on {args.backend}, {sum(map(length, part))} tokens", flush=True)
        print("\n".join(profile(lambda: step(part), device.synchronize)), flush=True)


def dense_flops(config: Any, lengths: list[int]) -> float:
    """The rule of thumb that published numbers use: 6 N for each token and 12 L H for each token and each position of its
    sequence, whatever is masked out or left out. N: all parameters, a tied embedding once."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 2 * config.hidden_size * (heads + config.num_key_value_heads) * head_dim
    layers = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    parameters = layers + config.vocab_size * config.hidden_size
    return 6.0 * parameters * sum(lengths) + 12.0 * config.num_hidden_layers * heads * head_dim * sum(n * n for n in lengths)


def main() -> None:
    """Every shape on every backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["qwen2.5-0.5b", "qwen2.5-3b"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(DEFAULT_BACKENDS))
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("--longest", type=int, default=7096, help="tokens of a trajectory, at most")
    parser.add_argument("--max-tokens", type=int, default=11008, help="tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=5, help="the first is not on the clock")
    parser.add_argument("--warmup", type=int, default=2, help="steps that do not count; at least 1")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--no-recompute", dest="recompute", action="store_false", help="keep all activations")
    parser.add_argument("--profile", action="store_true", help="also one micro-batch: its operations and synchronisations")
    parser.add_argument("--json", help="write all results into this file")
    for name in ("--backend", "--shape", "--model", "--result"):  # of the process that measures
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= args.warmup or args.warmup < 1:
        parser.error("--warmup: must be at least 1, and less than --steps")
    if args.result:
        measure(args)
        return
    words = ("tokens/s", "vs plain", "TFLOP/s", "MFU", "MFU 6NT", "peak GiB")
    print(f"{'shape':<14}{'backend':<15}" + "".join(f"{word:>10}" for word in words) + "  micro-batch", flush=True)
    rows: list[dict[str, Any]] = []
    failed = 0
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            # In a process of its own, so that this one holds no memory of the GPU.
            maker = multiprocessing.get_context("spawn").Process(target=make_model, args=(shape, Path(folder) / "model"))
            maker.start()
            maker.join()
            if maker.exitcode:
                sys.exit(f"{shape}: no model could be made")
            for backend in args.backends:
                result = Path(folder) / f"{backend}.json"
                command = [sys.executable, __file__, *sys.argv[1:], "--shape", shape, "--backend", backend]
                done = subprocess.run([*command, "--model", f"{folder}/model", "--result", str(result)], check=False)
                if not result.exists():
                    print(f"{shape} on {backend} failed (exit code {done.returncode})", flush=True)
                    failed += 1
                    continue
                rows.append(json.loads(result.read_text(encoding="utf-8")))
                print(as_line(rows[-1], rows), flush=True)
                if args.json:
                    Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(failed))


def as_line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A line of the table."""
    plain = [r["tokens_per_second"] for r in rows if r["shape"] == row["shape"] and r["backend"] == "transformers"]
    ratio = f"{row['tokens_per_second'] / plain[0]:.2f}" if plain else "-"
    mfu, dense = (f"{row[key]:.3f}" if row[key] is not None else "-" for key in ("mfu", "mfu_6nt"))
    return (
        f"{row['shape']:<14}{row['backend']:<15}{row['tokens_per_second']:>10.0f}{ratio:>10}{row['tflops']:>10.2f}"
        f"{mfu:>10}{dense:>10}{row['peak_gib']:>10.1f}  {row['max_tokens']} tokens, {row['device']}"
    )


if __name__ == "__main__":
    main()
