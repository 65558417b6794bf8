"""`searchr1 sft`: supervised fine-tuning with loss masks, packed, on one process or many (torchrun).

Rows (jsonl or parquet), one of
    {"messages": [{"role", "content"}, …]}              loss on the assistant's messages
    {"prompt": str, "response": str}                    loss on the response
    {"segments": [{"text": str, "train": bool}, …]}     loss where `train`; segments are tokenized one by one, as the agent
                                                        loop does with what the policy writes and what tools answer
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from searchr1.actor.batch_stats import all_reduce_denominators, all_reduce_max, count_denominators
from searchr1.actor.fsdp import FsdpModel
from searchr1.actor.model import init_process_group, load_model, policy_logprobs, shard_model
from searchr1.actor.optimizer import build_optimizer, build_schedule, clip_gradients
from searchr1.actor.packing import pack, plan_micro_batches, sequence_length, split_balanced
from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.config.schema_model import LrSchedConfig, OptimConfig
from searchr1.convert.hf_writer import DTYPES, write_weights
from searchr1.data.dataset import read_rows
from searchr1.device import Device
from searchr1.errors import UserError

REPORT_EVERY = 20


@dataclass(frozen=True, slots=True)
class Segment:
    """Text that is trained on, or only read."""

    text: str
    train: bool


def segments_of(row: dict[str, Any], tokenizer: Any) -> list[Segment]:
    """A row in any of the three shapes.

    Raises:
        UserError: none of them, or nothing to train on.
    """
    if isinstance(row.get("segments"), list):
        segments = [Segment(str(part["text"]), bool(part["train"])) for part in row["segments"]]
    elif isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        eos = tokenizer.eos_token or ""
        segments = [Segment(row["prompt"], False), Segment(row["response"] + eos, True)]
    elif isinstance(row.get("messages"), list):
        segments = _chat_segments(row["messages"], tokenizer)
    else:
        raise UserError("expected messages, prompt and response, or segments")
    if not any(segment.train and segment.text for segment in segments):
        raise UserError("nothing to train on: no assistant message, empty response, or no segment with train: true")
    return [segment for segment in segments if segment.text]


def _chat_segments(messages: list[dict[str, Any]], tokenizer: Any) -> list[Segment]:
    """The rendered conversation, cut where an assistant's message begins and ends."""
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; use prompt and response, or segments")
    segments, done = [], ""
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError("the chat template rewrites earlier messages; train on prompt and response instead")
        segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    return segments


def load_rows(paths: Sequence[Path], tokenizer: Any, max_length: int) -> tuple[list[Trajectory], int]:
    """Tokenized rows, and how many were left out because they are longer than `max_length`."""
    rows: list[Trajectory] = []
    too_long = 0
    for path in paths:
        for line, row in read_rows(path):
            try:
                segments = segments_of(row, tokenizer)
            except (UserError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{line}: {error}") from error
            encoded = tokenizer([segment.text for segment in segments], add_special_tokens=False)["input_ids"]
            ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in encoded])
            mask = np.repeat([segment.train for segment in segments], [len(part) for part in encoded])
            if not 1 < len(ids) <= max_length:
                too_long += 1
                continue
            # The first token is never predicted, so it serves as the prompt.
            rows.append(
                Trajectory(
                    sample=Sample(f"{path.name}/{line}", len(rows), [int(ids[0])], "", []),
                    replica=0,
                    response_ids=ids[1:],
                    loss_mask=mask[1:],
                    rollout_logprobs=np.zeros(len(ids) - 1, dtype=np.float32),
                    turns=[],
                    stop="eos",
                )
            )
    if not rows:
        raise UserError(f"{', '.join(map(str, paths))}: no row of at most {max_length} tokens")
    return rows, too_long


def batches(rows: Sequence[Trajectory], tokens: int, seed: int) -> Iterator[list[Trajectory]]:
    """At least `tokens` tokens each, in a new order every epoch, without end; a batch may reach into the next epoch."""
    batch: list[Trajectory] = []
    size = 0
    for epoch in itertools.count():
        for index in np.random.default_rng([seed, epoch]).permutation(len(rows)):
            batch.append(rows[int(index)])
            size += sequence_length(batch[-1])
            if size >= tokens:
                yield batch
                batch, size = [], 0


def train(args: argparse.Namespace) -> None:
    """The whole of it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    device = Device.detect(args.device)
    init_process_group(device)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    if args.fresh:
        fresh = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(args.fresh),
            dtype=torch.float32,
            attn_implementation=device.attention_implementation,
        )
        model = shard_model(fresh, device, precision=args.precision)
    else:
        model = load_model(args.model, device, precision=args.precision, gradient_checkpointing=args.gradient_checkpointing)
    policy = FsdpModel(model, device)
    rows, too_long = load_rows(args.data, tokenizer, args.max_length)
    tokens = sum(map(sequence_length, rows))
    steps = args.max_steps or max(1, round(args.epochs * tokens / args.tokens_per_batch))
    lead = dist.get_rank() == 0
    if lead:
        left_out = f" ({too_long} longer ones left out)" if too_long else ""
        print(f"{len(rows)} rows, {tokens} tokens{left_out}; {steps} steps of {args.tokens_per_batch} tokens", flush=True)
    optimizer = build_optimizer(
        model, OptimConfig(lr=args.lr, adam_beta2=0.98, adam_eps=1e-8, weight_decay=args.weight_decay)
    )
    schedule = build_schedule(
        optimizer, LrSchedConfig(lr_warmup_iters=args.warmup, lr_decay_style=args.schedule), args.lr, steps
    )
    started, seen = time.perf_counter(), 0
    loss_sum = weight_sum = 0.0
    torch_device = device.torch_device()
    for step, batch in enumerate(batches(rows, args.tokens_per_batch, args.seed), start=1):
        seen += sum(map(sequence_length, batch))
        share = split_balanced([sequence_length(t) for t in batch], dist.get_world_size())[dist.get_rank()]
        part = [batch[i] for i in share]
        denominators = all_reduce_denominators(count_denominators(part), torch_device)
        count = len(plan_micro_batches([sequence_length(t) for t in part], args.max_tokens_per_mbs))
        total = 0.0
        for micro in pack(part, args.max_tokens_per_mbs, at_least=all_reduce_max(count, torch_device)):
            logprobs_P = policy_logprobs(policy.model, micro.to(torch_device), 1.0).logprobs_M
            loss = -logprobs_P.sum() / denominators.tokens
            (loss * dist.get_world_size()).backward()
            total += float(loss.detach())
        norm = clip_gradients(model, args.clip_grad)
        if math.isfinite(norm):
            optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        loss_sum, weight_sum = 0.95 * loss_sum + 0.05 * total, 0.95 * weight_sum + 0.05
        if lead and (step % REPORT_EVERY == 0 or step == steps):
            seconds = time.perf_counter() - started
            left = seconds / step * (steps - step) / 60
            print(
                f"step {step}/{steps}  loss {loss_sum / weight_sum:.4f}  grad norm {norm:.2f}  "
                f"lr {schedule.get_last_lr()[0]:.1e}  {seen / seconds:.0f} tokens/s  left {left:.1f} min",
                flush=True,
            )
        if step == steps:
            break
    named = ((name, tensor.cpu()) for name, tensor in policy.named_weights(DTYPES[args.save_dtype]))
    if lead:
        args.output.mkdir(parents=True, exist_ok=True)
        write_weights(named, args.output)
        model.config.dtype = DTYPES[args.save_dtype]
        model.config.save_pretrained(args.output)  # type: ignore[union-attr, operator]
        tokenizer.save_pretrained(args.output)
        print(f"model -> {args.output}")
    else:
        for _ in named:
            pass
    dist.barrier()
    dist.destroy_process_group()


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    parser = argparse.ArgumentParser(
        prog="searchr1 sft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", help="Hugging Face folder or hub name to start from")
    start.add_argument("--fresh", help="folder with a config.json: start from random weights")
    parser.add_argument("--tokenizer", help="folder of the tokenizer (default: the model's)")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="jsonl or parquet files")
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, help="instead of --epochs")
    parser.add_argument("--tokens-per-batch", type=int, default=16384, help="tokens of an optimizer step")
    parser.add_argument("--max-tokens-per-mbs", type=int, default=8192, help="tokens of a packed micro-batch")
    parser.add_argument("--max-length", type=int, default=4096, help="longer rows are left out and counted")
    parser.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up")
    parser.add_argument("--schedule", choices=("constant", "linear", "cosine"), default="cosine")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the arithmetic")
    parser.add_argument("--save-dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.fresh and not args.tokenizer:
        raise UserError("--fresh needs --tokenizer")
    if args.output.exists() and any(args.output.iterdir()):
        raise UserError(f"--output {args.output}: exists and is not empty; give a new folder")
    train(args)
    return 0
