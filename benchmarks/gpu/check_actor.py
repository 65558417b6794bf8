"""Check that training on a GPU is right: the same three updates on the CPU in fp32 and on the GPU.

    python benchmarks/gpu/check_actor.py fsdp|megatron [--device cuda|cpu]

The GPU runs in fp32, in bf16, and in bf16 with recomputed activations and everything offloaded between the updates. Prints
one line per case and exits with 1 if one does not run or does not agree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

OFFLOADED = "bf16 offload recompute"
_BF16 = {"logprob max": 0.25, "loss": 0.05, "grad norm rel": 0.05, "weight rel": 0.05}
LIMITS = {
    "fp32": {"logprob max": 2e-4, "loss": 2e-3, "grad norm rel": 1e-3, "weight rel": 2e-3},
    "bf16": _BF16,
    OFFLOADED: _BF16,
}
LENGTHS = ((37, 90), (12, 200), (150, 33), (5, 61), (64, 64), (20, 300))


def trajectories(vocabulary: int) -> list[Any]:
    """Rows of the lengths above, half of each response sampled by the policy."""
    from searchr1.agent.trajectory import Sample, Trajectory

    rng = np.random.default_rng(0)
    found = []
    for index, (prompt, response) in enumerate(LENGTHS):
        mask = (np.arange(response) // 20) % 2 == 0
        found.append(
            Trajectory(
                sample=Sample(f"k/{index}", index, rng.integers(3, vocabulary, prompt).tolist(), "", []), rollout_id=0,
                response_ids=rng.integers(3, vocabulary, response).astype(np.int32), loss_mask=mask,
                rollout_logprobs=np.where(mask, -6.0, 0).astype(np.float32), turns=[], stop="answer",
            )
        )  # fmt: skip
    return found


def make_model(folder: Path, head_dim: int = 64) -> None:
    """Save a model of 4 layers, with weights large enough for the log-probabilities to differ."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=256 // head_dim,
        num_key_value_heads=2, head_dim=head_dim, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.06) if parameter.ndim > 1 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def run(args: argparse.Namespace) -> None:
    """Train for three updates, in a process of its own, and write what came of them."""
    import torch

    from searchr1.config.schema import Config
    from searchr1.device import Device
    from searchr1.learner.policy import Policy

    config = Config()
    config.rollout.model.model_path, config.rollout.model.precision = args.model, "fp32"
    config.runner.max_tokens_per_mbs = 700
    config.algorithm.kl_beta, config.algorithm.calculate_entropy = 0.0, True
    config.actor.training_backend, config.actor.model.precision = args.backend, args.precision
    config.actor.optim.lr = 1e-3
    if args.offload:
        config.actor.offload_weight = config.actor.offload_grad = config.actor.offload_optimizer = True
    if args.recompute and args.backend == "fsdp":
        config.actor.model.gradient_checkpointing = True
    elif args.recompute:
        config.actor.model.recompute_granularity, config.actor.model.recompute_method = "full", "block"
        config.actor.model.recompute_num_layers = 4
    device = Device.detect(args.device)
    policy = Policy.start(config, device)
    rows = trajectories(1000)
    before = policy.logprobs(rows)
    losses, freed = [], 0.0
    for step in range(3):
        if args.offload and step:
            held = device.memory().used_bytes
            policy.offload("weight", "grad", "optimizer")
            device.empty_cache()
            freed = held - device.memory().used_bytes
        metrics = policy.train_step(rows, [1.0, -1.0] * (len(rows) // 2), [0] * len(rows))
        losses.append([metrics["actor/loss"], metrics["actor/grad_norm"], metrics.get("actor/entropy", 0.0)])
    policy.reload("weight")
    after = policy.logprobs(rows)
    weights = {name: value.float().cpu() for name, value in policy.named_weights(torch.float32)}
    torch.save({"before": before, "after": after, "losses": losses, "weights": weights, "freed": freed}, args.result)


def start(args: argparse.Namespace, folder: Path, name: str, words: list[str]) -> tuple[subprocess.Popen[bytes], Path, Path]:
    """Start one case in a process of its own; all cases run at once."""
    result, log = folder / f"{name.replace(' ', '-')}.pt", folder / f"{name.replace(' ', '-')}.log"
    extra = [] if "--device" in words else ["--device", args.device]
    # Megatron-Core takes the CPU's path only where it sees no GPU.
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if name == "cpu fp32" else {})
    command = [sys.executable, __file__, args.backend, *words, *extra, "--model", f"{folder}/model", "--result", str(result)]
    return subprocess.Popen(command, env=env, stdout=log.open("wb"), stderr=subprocess.STDOUT), result, log


def main() -> None:
    """Run all cases and compare them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=("fsdp", "megatron"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--result")
    args = parser.parse_args()
    if args.result:
        return run(args)
    import torch

    failed: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        cases = {
            "cpu fp32": ["--device", "cpu"],
            "fp32": [],
            "bf16": ["--precision", "bf16"],
            OFFLOADED: ["--precision", "bf16", "--offload", "--recompute"],
        }
        running = {name: start(args, Path(folder), name, words) for name, words in cases.items()}
        for name, (process, result, log) in running.items():
            process.wait()
            if process.returncode:
                print(f"FAIL {args.backend} {name}: did not run\n{log.read_text(encoding='utf-8')[-2500:]}")
                failed.append(name)
                continue
            found[name] = torch.load(result, weights_only=False)  # written by our own process
            print(f"ran  {args.backend} {name}, losses {np.round([row[0] for row in found[name]['losses']], 5)}")
    reference = found.get("cpu fp32")
    if reference is None:
        sys.exit(1)
    for name, limits in LIMITS.items():
        if name not in found:
            continue
        gaps = compare(found[name], reference)
        ok = all(gaps[key] <= limit for key, limit in limits.items())
        shown = json.dumps({key: float(f"{value:.3g}") for key, value in gaps.items()})
        print(f"{'ok   ' if ok else 'FAIL '}{args.backend} {name} against cpu fp32: {shown}")
        failed += [] if ok else [name]
    if "bf16" in found and OFFLOADED in found:
        gap = compare(found[OFFLOADED], found["bf16"])["weight rel"]
        freed = found[OFFLOADED]["freed"] / 2**20
        verdict = "ok   " if gap < 5e-3 else "FAIL "
        print(f"{verdict}{args.backend} {OFFLOADED}: weights differ by {gap:.2g}, {freed:.0f} MiB freed")
        failed += [] if gap < 5e-3 else ["offload"]
    sys.exit(bool(failed))


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Largest differences of two runs: of log-probabilities before training, losses, gradient norms and trained weights."""
    logprobs = zip(one["before"], other["before"], strict=True)
    updates = list(zip(one["losses"], other["losses"], strict=True))
    return {
        "logprob max": max(float(np.abs(a - b).max()) for a, b in logprobs),
        "loss": max(abs(a[0] - b[0]) for a, b in updates),
        "grad norm rel": max(abs(a[1] / b[1] - 1) for a, b in updates),
        "weight rel": max(float((one["weights"][name] - w).norm() / w.norm()) for name, w in other["weights"].items()),
    }


if __name__ == "__main__":
    main()
