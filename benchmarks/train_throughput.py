"""Training speed of both backends beside a plain transformers step, on the same packed trajectories.

    python benchmarks/train_throughput.py                                    Qwen2.5-0.5B and 3B shapes, needs a GPU
    python benchmarks/train_throughput.py --shapes tiny --precision fp32     to see that it runs, on anything

Weights are random, sequences as long as in the Search-R1 recipe (prompt 300 to 1,500 tokens, at most 7,096 in all, about
half of the response sampled by the policy). Every measurement is a process of its own; the first steps warm up. Model
FLOPs are those of the architecture (forward and backward, without recomputation; causal attention counts the half that is
computed; the output layer counts where logits are needed: policy tokens). Peak memory is torch's on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 2048},
    "qwen2.5-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                     "num_key_value_heads": 2, "vocab_size": 151936},
    "qwen2.5-3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                   "num_key_value_heads": 2, "vocab_size": 151936},
}  # fmt: skip
BACKENDS = ("transformers", "fsdp", "megatron")
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
                replica=0,
                response_ids=rng.integers(0, vocabulary, response).astype(np.int32),
                loss_mask=mask,
                rollout_logprobs=np.where(mask, -10, 0).astype(np.float32),
                turns=[],
                stop="answer",
            )
        )
    return found


def run_policy(args: argparse.Namespace, trajectories: list[Any]) -> list[float]:
    """Seconds of each step on one of our backends."""
    from searchr1.actor.policy import Policy
    from searchr1.config.schema import Config
    from searchr1.device import Device

    config = Config()
    config.rollout.model.model_path = str(args.model)
    config.runner.max_tokens_per_mbs = args.max_tokens
    config.algorithm.kl_beta = 0.0
    config.actor.training_backend = args.backend
    config.actor.model.precision = args.precision
    if args.recompute and args.backend == "fsdp":
        config.actor.model.gradient_checkpointing = True
    elif args.recompute:
        config.actor.model.recompute_granularity = "full"
    device = Device.detect("auto")
    policy = Policy.start(config, device)
    seconds = []
    for _ in range(args.steps):
        device.synchronize()
        started = time.perf_counter()
        policy.train_step(trajectories, [1.0, -1.0] * (len(trajectories) // 2), [0] * len(trajectories))
        device.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def run_transformers(args: argparse.Namespace, trajectories: list[Any]) -> list[float]:
    """The same loss as people write it: padded batches of the same number of tokens, all logits, torch's AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    from searchr1.device import Device

    device = Device.detect("auto")
    place = device.torch_device()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").to(place)
    if args.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    rows = sorted(trajectories, key=lambda t: -len(t.sample.prompt_ids) - len(t.response_ids))
    lengths = [len(t.sample.prompt_ids) + len(t.response_ids) for t in rows]
    batches: list[list[int]] = []
    for index in range(len(rows)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > args.max_tokens:
            batches.append([])
        batches[-1].append(index)
    tokens = sum(int(t.loss_mask.sum()) for t in rows)
    seconds = []
    for _ in range(args.steps):
        device.synchronize()
        started = time.perf_counter()
        for members in batches:
            longest = max(lengths[i] for i in members)
            ids = torch.zeros(len(members), longest, dtype=torch.long)
            mask, attention = torch.zeros(len(members), longest), torch.zeros(len(members), longest, dtype=torch.long)
            for row, i in enumerate(members):
                t, first = rows[i], len(rows[i].sample.prompt_ids)
                ids[row, : lengths[i]] = torch.tensor([*t.sample.prompt_ids, *t.response_ids.tolist()])
                mask[row, first : lengths[i]] = torch.tensor(t.loss_mask)
                attention[row, : lengths[i]] = 1
            ids, mask, attention = ids.to(place), mask.to(place), attention.to(place)
            with torch.autocast(place.type, dtype, enabled=dtype != torch.float32):
                logits = model(ids, attention_mask=attention).logits[:, :-1]
            logprobs = torch.gather(logits.float().log_softmax(-1), -1, ids[:, 1:, None])[..., 0]
            (-(logprobs * mask[:, 1:]).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        device.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(args: argparse.Namespace) -> None:
    """In a process of its own: prints one JSON line."""
    import torch
    from transformers import AutoConfig

    from searchr1.actor.flops import training_flops
    from searchr1.device import Device

    trajectories = make_trajectories(args.trajectories, SHAPES[args.shape]["vocab_size"], args.longest)
    run = run_transformers if args.backend == "transformers" else run_policy
    seconds = float(np.median(run(args, trajectories)[args.warmup :]))
    lengths = [len(t.sample.prompt_ids) + len(t.response_ids) for t in trajectories]
    config = AutoConfig.from_pretrained(args.model)
    flops = training_flops(config, lengths, sum(int(t.loss_mask.sum()) for t in trajectories))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in name), math.nan)
    print(json.dumps({
        "shape": args.shape, "backend": args.backend, "device": name, "tokens": sum(lengths), "seconds": seconds,
        "tokens_per_second": sum(lengths) / seconds, "tflops": flops / seconds / 1e12, "mfu": flops / seconds / 1e12 / peak,
        "peak_gib": Device.detect("auto").memory().peak_bytes / 2**30,
    }))  # fmt: skip


def main() -> None:
    """Every shape on every backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["qwen2.5-0.5b", "qwen2.5-3b"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--trajectories", type=int, default=32)
    parser.add_argument("--longest", type=int, default=7096, help="tokens of a trajectory, at most")
    parser.add_argument("--max-tokens", type=int, default=11008, help="tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps that do not count")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--no-recompute", dest="recompute", action="store_false", help="keep all activations")
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model:
        measure(args)
        return
    rows = []
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            make_model(shape, Path(folder))
            for backend in args.backends:
                words = [sys.executable, __file__, *sys.argv[1:], "--shape", shape, "--backend", backend, "--model", folder]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=os.environ, check=False)
                if done.returncode:
                    print(f"{shape} on {backend} failed (exit code {done.returncode})", file=sys.stderr)
                    continue
                rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
    print(f"{'shape':<14}{'backend':<14}{'tokens/s':>10}{'vs plain':>10}{'TFLOP/s':>10}{'MFU':>8}{'peak GiB':>10}  device")
    for row in rows:
        same = [r for r in rows if r["shape"] == row["shape"] and r["backend"] == "transformers"]
        ratio = row["tokens_per_second"] / same[0]["tokens_per_second"] if same else math.nan
        print(
            f"{row['shape']:<14}{row['backend']:<14}{row['tokens_per_second']:>10.0f}{ratio:>10.2f}{row['tflops']:>10.2f}"
            f"{row['mfu']:>8.2f}{row['peak_gib']:>10.1f}  {row['device']}"
        )


if __name__ == "__main__":
    main()
