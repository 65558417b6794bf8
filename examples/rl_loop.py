"""GRPO on a model that searches, from top to bottom in one process: no Ray, no worker groups, no configuration to learn.

    python examples/rl_loop.py --steps 3

The demo's model answers questions about a fictional encyclopedia. It writes `<search>…</search>`, reads what a real
retrieval server found, and ends with `<answer>…</answer>`. vLLM samples, this file trains, and the new weights go back
into vLLM. `searchr1 train` does the same with worker groups on many GPUs: its first step has the same loss
(tests/e2e/test_rl_loop.py).
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import os
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from searchr1.agent.loop import run_group, run_trajectory
from searchr1.agent.settings import AgentSettings
from searchr1.agent.tools import build_tools
from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.algorithms.entropy import logprobs_from_logits
from searchr1.config.load import load_config
from searchr1.data.dataset import load_data, load_tokenizer
from searchr1.data.loader import PromptLoader
from searchr1.demo.demo import retrieval_server
from searchr1.demo.files import write_world
from searchr1.device import Device
from searchr1.learner import attention
from searchr1.learner.packing import PackedBatch, pack
from searchr1.rewards.answers import answer_of, exact_match
from searchr1.rollout.engine import Engine
from searchr1.rollout.settings import EngineSettings
from searchr1.rollout.weights import WeightPublisher
from searchr1.training.train import hash_seed

RECIPE = "examples/searchr1/config/tiny-cpu.yaml"
QUESTIONS, GROUP_SIZE = 16, 8  # per step: 16 questions, 8 rollouts each
LEARNING_RATE, WARMUP_STEPS, MAX_GRAD_NORM = 1e-4, 2, 1.0
CLIP_LOW, CLIP_HIGH, KL_BETA = 0.2, 0.28, 0.001
TOKENS_PER_MICRO_BATCH = 8192


async def train(folder: Path, address: str, steps: int) -> list[dict[str, float]]:
    """Train for `steps` steps against the retrieval server at `address`. Return a row of metrics for each step."""
    config = load_config(RECIPE, [f"vars.demo={folder}", f"tools.search.server_addr={address}"])
    path, device = config.rollout.model.model_path, Device.detect("cpu")
    settings = AgentSettings.from_config(config, "train")  # turns, tokens per turn, stop strings
    tokenizer, tools = load_tokenizer(config), build_tools(config.tools, settings.information_style)
    loader = PromptLoader(load_data(config).train, QUESTIONS, seed=0, shuffle=True, max_epochs=100)

    engine = await Engine.start(path, device, EngineSettings.from_config(config))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention.NAME)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    publisher = WeightPublisher(folder / "weights")

    async def rollout_group(sample: Sample, seed: int) -> list[Trajectory]:
        """Answer one question `GROUP_SIZE` times: generate, search, read, generate again, without waiting for others."""
        return await run_group(
            run_trajectory, GROUP_SIZE, sample=sample, engine=engine, tools=tools, tokenizer=tokenizer, settings=settings,
            seed=seed,
        )  # fmt: skip

    rows = []
    for step in range(1, steps + 1):
        started = time.perf_counter()
        # 1. Rollouts: all groups at once. What the policy sampled is kept as token ids, with its log-probabilities.
        groups = await asyncio.gather(*(rollout_group(sample, hash_seed(0, step)) for sample in loader.next_batch()))
        trajectories = [trajectory for group in groups for trajectory in group]

        # 2. Rewards: does the last answer match a gold answer? Only what the policy wrote counts, never what it read.
        for trajectory in trajectories:
            trajectory.reward = exact_match(answer_of(trajectory.policy_text), trajectory.sample.golden_answers)

        # 3. Advantages: how much better a rollout was than the others of its group.
        rewards_GR = torch.tensor([[trajectory.reward for trajectory in group] for group in groups])
        advantages_GR = (rewards_GR - rewards_GR.mean(1, keepdim=True)) / (rewards_GR.std(1, keepdim=True) + 1e-6)

        # 4. One update: trajectories packed end to end without padding, gradients added up over micro-batches.
        policy_tokens = sum(trajectory.policy_length for trajectory in trajectories)
        loss = 0.0
        for batch in pack(trajectories, TOKENS_PER_MICRO_BATCH, advantages=advantages_GR.flatten().tolist()):
            part = policy_loss(model, reference, batch) / policy_tokens
            part.backward()
            loss += part.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
        optimizer.step()
        optimizer.zero_grad()

        # 5. The new weights go into the engine, a bucket at a time through shared memory.
        elements = sum(parameter.numel() for parameter in model.parameters())
        for bucket in publisher.publish(model.named_parameters(), step, elements):
            await engine.update_weights(bucket)
        publisher.release()

        searches = sum(trajectory.searches for trajectory in trajectories) / len(trajectories)
        row = {"reward": rewards_GR.mean().item(), "loss": loss, "grad_norm": float(norm), "searches": searches}
        print(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in row.items()), end="  ")
        print(f"{time.perf_counter() - started:.1f} s", flush=True)
        rows.append(row)
    publisher.close()
    for tool in tools.values():
        await tool.aclose()
    await engine.close()
    return rows


def policy_loss(model: nn.Module, reference: nn.Module, batch: PackedBatch) -> Tensor:
    """Return the sum over the batch's policy tokens of PPO's clipped loss plus the KL to the reference (the k3 estimate)."""
    positions_P = batch.policy_positions_P
    logprobs_P = token_logprobs(model, batch)
    with torch.no_grad():
        ref_logprobs_P = token_logprobs(reference, batch)
    # One update per rollout step: the weights are still those that sampled, so the ratio is 1, and its gradient is not.
    ratio_P = (logprobs_P - logprobs_P.detach()).exp()
    advantages_P = batch.advantages_T[positions_P]
    clipped_P = ratio_P.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    policy_loss_P = -torch.minimum(ratio_P * advantages_P, clipped_P * advantages_P)
    gap_P = ref_logprobs_P - logprobs_P
    return (policy_loss_P + KL_BETA * (gap_P.exp() - gap_P - 1)).sum()


def token_logprobs(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return the log-probabilities [P] of the policy's tokens; only their positions reach the output layer."""
    positions_P = batch.policy_positions_P
    logits_PV = model(**attention.packed_model_inputs(batch), logits_to_keep=positions_P - 1).logits[0]
    return logprobs_from_logits(logits_PV, batch.input_ids_T[positions_P]).logprobs_M


def main() -> None:
    """Make the demo's world, start its retrieval server, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    steps = parser.parse_args().steps
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(0, folder / "world")
        with retrieval_server(folder / "world", folder / "retrieval.log") as address:
            asyncio.run(train(folder, address, steps))


if __name__ == "__main__":
    main()
