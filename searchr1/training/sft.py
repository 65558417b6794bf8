"""`searchr1 sft`: supervised fine-tuning with loss masks, packed, on one process or many (torchrun).

Rows (files of docs/guides/data.md, or data sets of the hub), one of
    {"messages": [{"role", "content"}, …]}              loss on the assistant's messages; also ShareGPT's conversations
    {"prompt": str, "response": str}                    loss on the response
    {"segments": [{"text": str, "train": bool}, …]}     loss where `train`; segments are tokenized one by one, as the agent
                                                        loop does with what the policy writes and what tools answer

Several ranks: torchrun --nproc-per-node 8 -m searchr1.cli sft --backend megatron --tensor-parallel 2 …
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from searchr1.agent.trajectory import Trajectory
from searchr1.algorithms.entropy import TokenLogprobs
from searchr1.algorithms.sums import Sums
from searchr1.checkpoints.hf_writer import DTYPES, write_weights
from searchr1.checkpoints.model_folder import verify_weights, write_model_sums
from searchr1.checkpoints.weight_check import check_model_folder
from searchr1.config.schema import Config
from searchr1.config.schema_model import LrSchedConfig, OptimConfig
from searchr1.data.model_settings import FILE, ModelSettings
from searchr1.data.model_source import load_model_config, load_tokenizer, require_source
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.files.folder_lock import folder_lock, is_lock
from searchr1.learner.backend import Backend
from searchr1.learner.model import init_process_group
from searchr1.learner.packing import PackedBatch, pack, plan_micro_batches, sequence_length, split_balanced
from searchr1.learner.policy import Policy
from searchr1.preflight.check_models import model_positions
from searchr1.training.sft_data import batches, load_rows, rows_settings

REPORT_EVERY = 20
DEFAULT_MAX_LENGTH = 4096


def train(args: argparse.Namespace) -> list[float]:
    """The whole of it. Returns every step's loss: the mean negative log-likelihood of a trained token."""
    device = Device.detect(args.device, "--device")
    init_process_group(device)
    lead = dist.get_rank() == 0
    if lead and not device.computes_in(args.precision):
        print(f"warning: --precision {args.precision} has no instructions on this CPU and is emulated, slowly; use fp32")
    if args.model:
        try:
            if lead:
                verify_weights(args.model)
            check_model_folder(args.model)
        except UserError as error:
            raise UserError(f"--model {error}") from error
    tokenizer = load_tokenizer(args.tokenizer or args.model, "--tokenizer" if args.tokenizer else "--model")
    rows, too_long = load_rows(args.data, tokenizer, longest_row(args))
    tokens = sum(map(sequence_length, rows))
    steps = args.max_steps or max(1, round(args.epochs * tokens / args.tokens_per_batch))
    with _start_folder(args, lead) as folder:
        backend = Policy.start(run_config(args, folder, dist.get_world_size()), device, steps).backend
        hf_config = load_model_config(folder, "--model")
    if lead:
        left_out = f" ({too_long} longer ones left out)" if too_long else ""
        print(f"{len(rows)} rows, {tokens} tokens{left_out}; {steps} steps of {args.tokens_per_batch} tokens", flush=True)
    losses = []
    report = _Report(steps) if lead else None
    for step, batch in enumerate(batches(rows, args.tokens_per_batch, args.seed), start=1):
        losses.append(accumulate(backend, batch, args.max_tokens_per_mbs))
        norm, rate = backend.clip_gradients(args.clip_grad), backend.learning_rate
        if math.isfinite(norm):
            backend.step()
        backend.zero_grad()
        if report is not None:
            report.add(step, batch, losses[-1], norm, rate)
        if step == steps:
            break
    named = backend.named_weights(DTYPES[args.save_dtype])
    if lead:
        write_weights(((name, tensor.cpu()) for name, tensor in named), args.output)
        hf_config.dtype = DTYPES[args.save_dtype]
        hf_config.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        settings = rows_settings(rows, tokenizer, None if args.fresh else ModelSettings.of_model(args.model))
        settings.write(args.output)
        write_model_sums(args.output)
        print(f"{args.output / FILE}: {settings.described()}")
        print(f"model -> {args.output}")
    else:
        for _ in named:  # gathering is a collective
            pass
    dist.barrier()
    dist.destroy_process_group()
    return losses


def longest_row(args: argparse.Namespace) -> int:
    """Tokens of a row, at most: no more than the model has positions.

    Raises:
        UserError: more are asked for.
    """
    model = args.model or args.fresh
    positions, asked = model_positions(model) or math.inf, args.max_length
    if asked is not None and asked > positions:
        raise UserError(f"--max-length {asked}: {model} has {positions} positions; give {positions} or less")
    return int(min(DEFAULT_MAX_LENGTH, positions) if asked is None else asked)


def accumulate(backend: Backend, batch: Sequence[Trajectory], max_tokens: int) -> float:
    """Add up the gradients of one batch, of which every replica takes its share. Returns the loss over all ranks.

    Args:
        backend: without gradients.
        batch: the same on all ranks.
        max_tokens: of a micro-batch.
    """
    shares = split_balanced([sequence_length(t) for t in batch], dist.get_world_size(backend.data_group))
    counts = [len(plan_micro_batches([sequence_length(batch[i]) for i in share], max_tokens)) for share in shares]
    micro = pack([batch[i] for i in shares[backend.replica]], max_tokens, at_least=max(counts))
    trained = sum(trajectory.policy_length for trajectory in batch)
    sums = Sums()

    def loss(_: PackedBatch, values: TokenLogprobs) -> Tensor:
        nonlocal sums
        value = -values.logprobs_M.sum() / trained
        sums = sums + Sums({"loss": value.detach().double()})
        return value

    backend.forward_backward([one.to(backend.device) for one in micro], 1.0, False, loss)
    return float(backend.share(sums).totals["loss"])


def run_config(args: argparse.Namespace, model_path: str, world: int) -> Config:
    """What the backends read of a run's configuration.

    Raises:
        UserError: flags that exclude each other, or a layout that does not divide the `world` ranks.
    """
    megatron = args.backend == "megatron"
    parts = args.tensor_parallel * args.pipeline_parallel
    if not megatron and parts != 1:
        raise UserError("--tensor-parallel, --pipeline-parallel: need --backend megatron")
    if megatron and args.lora_rank:
        raise UserError("--lora-rank: needs --backend fsdp")
    if world % parts:
        raise UserError(
            f"--tensor-parallel {args.tensor_parallel} x --pipeline-parallel {args.pipeline_parallel} does not divide the "
            f"{world} processes; start a multiple of {parts} with torchrun --nproc-per-node"
        )
    config = Config()
    config.rollout.model.model_path = model_path
    config.runner.max_tokens_per_mbs = args.max_tokens_per_mbs
    actor = config.actor
    actor.training_backend, actor.seed = args.backend, args.seed
    actor.model.precision = args.precision
    actor.model.tensor_model_parallel_size = args.tensor_parallel
    actor.model.pipeline_model_parallel_size = args.pipeline_parallel
    actor.model.gradient_checkpointing = args.gradient_checkpointing and not megatron
    actor.model.recompute_granularity = "full" if args.gradient_checkpointing and megatron else None
    actor.optim = OptimConfig(
        lr=args.lr, adam_beta2=0.98, adam_eps=args.adam_eps, weight_decay=args.weight_decay, clip_grad=args.clip_grad
    )
    actor.lr_sched = LrSchedConfig(lr_warmup_iters=args.warmup, lr_decay_style=args.schedule)
    actor.lora.rank, actor.lora.alpha = args.lora_rank, args.lora_alpha
    return config


@contextmanager
def _start_folder(args: argparse.Namespace, lead: bool) -> Iterator[str]:
    """The model to start from; random weights are written beside the output first, for as long as ranks read them."""
    from transformers import AutoModelForCausalLM

    if not args.fresh:
        yield args.model
        return
    folder = args.output.with_name(f".{args.output.name}.fresh")
    try:
        if lead:
            torch.manual_seed(args.seed)
            config = load_model_config(args.fresh, "--fresh")
            fresh: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
            fresh.save_pretrained(folder)
        dist.barrier()
        yield str(folder)
        dist.barrier()
    finally:
        if lead:
            shutil.rmtree(folder, ignore_errors=True)


class _Report:
    """A line now and then."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._started, self._seen = time.perf_counter(), 0
        self._loss_sum = self._weight_sum = 0.0

    def add(self, step: int, batch: Sequence[Trajectory], loss: float, norm: float, rate: float) -> None:
        """What one step did; the loss printed is a running mean."""
        self._seen += sum(map(sequence_length, batch))
        self._loss_sum, self._weight_sum = 0.95 * self._loss_sum + 0.05 * loss, 0.95 * self._weight_sum + 0.05
        if step % REPORT_EVERY and step != self._steps:
            return
        seconds = time.perf_counter() - self._started
        left = seconds / step * (self._steps - step) / 60
        print(
            f"step {step}/{self._steps}  loss {self._loss_sum / self._weight_sum:.4f}  grad norm {norm:.2f}  "
            f"lr {rate:.1e}  {self._seen / seconds:.0f} tokens/s  left {left:.1f} min",
            flush=True,
        )


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    args = parse(argv)
    lead = os.environ.get("RANK", "0") == "0"
    with folder_lock(args.output, "--output", "searchr1 sft") if lead else nullcontext():
        _make_output(args.output)
        train(args)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: flags that exclude each other, or an output that is in use.
    """
    parser = argparse.ArgumentParser(
        prog="searchr1 sft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", help="Hugging Face folder or hub name to start from")
    start.add_argument("--fresh", help="folder with a config.json: start from random weights")
    parser.add_argument("--tokenizer", help="folder of the tokenizer (default: the model's)")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of rows, or data sets of the hub")
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, help="instead of --epochs")
    parser.add_argument("--tokens-per-batch", type=int, default=16384, help="tokens of an optimizer step")
    parser.add_argument("--max-tokens-per-mbs", type=int, default=8192, help="tokens of a packed micro-batch")
    parser.add_argument(
        "--max-length", type=int, help="longer rows are left out and counted (default 4096, or the model's positions)"
    )
    parser.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up")
    parser.add_argument("--schedule", choices=("constant", "linear", "cosine"), default="cosine")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--adam-eps", type=float, default=1e-8, help="added to the root of the second moment")
    parser.add_argument("--backend", choices=("fsdp", "megatron"), default="fsdp", help="FSDP2 or Megatron-Core")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share each layer (megatron)")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="ranks that share the layers (megatron)")
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank (fsdp); the output is merged")
    parser.add_argument("--lora-alpha", type=float, default=32.0, help="the adapters' update is scaled by alpha / rank")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the arithmetic")
    parser.add_argument("--save-dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.fresh and not args.tokenizer:
        raise UserError("--fresh needs --tokenizer")
    if args.fresh and args.lora_rank:
        raise UserError("--lora-rank: random weights are not worth freezing; leave it out, or start from --model")
    if min(args.tensor_parallel, args.pipeline_parallel) < 1 or args.lora_rank < 0 or args.lora_alpha <= 0:
        raise UserError("--tensor-parallel, --pipeline-parallel and --lora-alpha must be more than 0, --lora-rank 0 or more")
    for flag in ("model", "fresh"):
        if getattr(args, flag) is not None:
            require_source(getattr(args, flag), f"--{flag}")
    _make_output(args.output)
    return args


def _make_output(output: Path) -> None:
    """Make the folder now: a place that cannot be written to is not discovered when the training is done.

    Raises:
        UserError: it is in use, a file, or not writable.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        in_use = any(not is_lock(path.name) for path in output.iterdir())
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made ({error.strerror}); give a new folder") from error
    if in_use:
        raise UserError(f"--output {output}: exists and is not empty; give a new folder")
    if not os.access(output, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: is not writable; give another folder")
