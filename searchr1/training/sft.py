"""Supervised fine-tuning with loss masks, packed, on one process or many; see `searchr1 sft`."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from searchr1.config.schema_model import (
    ActorModelConfig,
    LoraConfig,
    LrDecay,
    LrSchedConfig,
    OptimConfig,
    Precision,
    TrainingBackend,
)
from searchr1.data.model_settings import FILE, ModelSettings
from searchr1.data.model_source import load_model_config, load_tokenizer
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.files.atomic import sync
from searchr1.learner.backend import AnyPolicyBackend, PolicySchedule
from searchr1.learner.model import init_process_group
from searchr1.learner.packing import PackedBatch, pack, plan_micro_batches, sequence_length, split_balanced
from searchr1.learner.start import start_policy_backend
from searchr1.learner.trainer_config import TrainerConfig
from searchr1.preflight.check_models import model_positions
from searchr1.training.sft_data import batches, load_rows, rows_settings

REPORT_EVERY = 20
DEFAULT_MAX_LENGTH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """A run of supervised fine-tuning; the fields are the flags of `searchr1 sft`."""

    model: str | None = None
    fresh: str | None = None
    tokenizer: str | None = None
    data: list[Path]
    output: Path
    lr: float
    epochs: float
    max_steps: int | None = None
    tokens_per_batch: int
    max_tokens_per_mbs: int
    max_length: int | None = None
    warmup: int
    schedule: LrDecay
    weight_decay: float
    clip_grad: float
    adam_eps: float
    backend: TrainingBackend
    tensor_parallel: int
    pipeline_parallel: int
    lora_rank: int
    lora_alpha: float
    precision: Precision
    save_dtype: str
    gradient_checkpointing: bool
    device: str
    seed: int

    @property
    def start(self) -> str:
        """Folder or hub name of the model, or of the configuration for random weights."""
        start = self.model or self.fresh
        assert start is not None
        return start


def train(config: SftConfig) -> list[float]:
    """Train a model and write it. Return every step's loss: the mean negative log-likelihood of a trained token.

    Raises:
        UserError: a flag, a row or a model that cannot be used.
    """
    device = Device.detect(config.device, "--device")
    init_process_group(device)
    lead = dist.get_rank() == 0
    if lead and not device.computes_in(config.precision):
        print(f"warning: --precision {config.precision} has no instructions on this CPU and is emulated, slowly; use fp32")
    if config.model:
        try:
            if lead:
                verify_weights(config.model)
            check_model_folder(config.model)
        except UserError as error:
            raise UserError(f"--model {error}") from error
    tokenizer = load_tokenizer(config.tokenizer or config.start, "--tokenizer" if config.tokenizer else "--model")
    rows, too_long = load_rows(config.data, tokenizer, longest_row(config.start, config.max_length))
    tokens = sum(map(sequence_length, rows))
    steps = config.max_steps or max(1, round(config.epochs * tokens / config.tokens_per_batch))
    with _start_folder(config, lead) as folder:
        backend = start_policy_backend(trainer_config(config, folder, dist.get_world_size(), steps), device)
        hf_config = load_model_config(folder, "--model")
    if lead:
        left_out = f" ({too_long} longer ones left out)" if too_long else ""
        print(f"{len(rows)} rows, {tokens} tokens{left_out}; {steps} steps of {config.tokens_per_batch} tokens", flush=True)
    losses = []
    report = _Report(steps) if lead else None
    for step, batch in enumerate(batches(rows, config.tokens_per_batch, config.seed), start=1):
        losses.append(accumulate(backend, batch, config.max_tokens_per_mbs))
        norm, rate = backend.clip_gradients(config.clip_grad), backend.learning_rate
        if math.isfinite(norm):
            backend.step()
        backend.zero_grad()
        if report is not None:
            report.add(step, batch, losses[-1], norm, rate)
        if step == steps:
            break
    named = backend.named_weights(DTYPES[config.save_dtype])
    if lead:
        write_weights(((name, tensor.cpu()) for name, tensor in named), config.output)
        hf_config.dtype = DTYPES[config.save_dtype]
        hf_config.save_pretrained(config.output)
        tokenizer.save_pretrained(config.output)
        settings = rows_settings(rows, tokenizer, None if config.fresh else ModelSettings.of_model(config.start))
        settings.write(config.output)
        write_model_sums(config.output)
        sync([*config.output.rglob("*"), config.output])
        print(f"{config.output / FILE}: {settings.described()}")
        print(f"model -> {config.output}")
    else:
        for _ in named:  # gathering is a collective
            pass
    dist.barrier()
    dist.destroy_process_group()
    return losses


def longest_row(model: str, asked: int | None) -> int:
    """Return the most tokens that a row may have: no more than the model has positions.

    Args:
        model: folder or hub name of the model, or of its configuration.
        asked: `--max-length`; None is the default.

    Raises:
        UserError: more are asked for.
    """
    positions = model_positions(model) or math.inf
    if asked is not None and asked > positions:
        raise UserError(f"--max-length {asked}: {model} has {positions} positions; give {positions} or less")
    return int(min(DEFAULT_MAX_LENGTH, positions) if asked is None else asked)


def accumulate(backend: AnyPolicyBackend, batch: Sequence[Trajectory], max_tokens: int) -> float:
    """Add up the gradients of one batch, of which every data-parallel rank takes its share. Return the loss over all ranks.

    Args:
        backend: without gradients.
        batch: the same on all ranks.
        max_tokens: of a micro-batch.
    """
    shares = split_balanced([sequence_length(t) for t in batch], dist.get_world_size(backend.data_group))
    counts = [len(plan_micro_batches([sequence_length(batch[i]) for i in share], max_tokens)) for share in shares]
    packed = pack([batch[i] for i in shares[backend.dp_rank]], max_tokens, at_least=max(counts))
    micro = [one.to(backend.device) for one in packed]
    trained = sum(trajectory.policy_length for trajectory in batch)
    sums = Sums()

    def negative_log_likelihood(_: PackedBatch, values: TokenLogprobs) -> Tensor:
        nonlocal sums
        loss = -values.logprobs_M.sum() / trained
        sums = sums + Sums({"loss": loss.detach().double()})
        return loss

    if isinstance(backend, PolicySchedule):  # a pipeline decides itself which stage runs what when
        backend.run_schedule(micro, 1.0, False, negative_log_likelihood)
    else:
        for one in micro:
            values = backend.forward(one, 1.0, False)
            loss = negative_log_likelihood(one, values)
            backend.backward(loss)
    return float(backend.share(sums).totals["loss"])


def trainer_config(config: SftConfig, model_path: str, world: int, total_steps: int | None = None) -> TrainerConfig:
    """Return what the training backend needs to know.

    Args:
        config: of the run.
        model_path: folder or hub name of the weights to start from.
        world: processes.
        total_steps: optimizer steps of the run.

    Raises:
        UserError: flags that exclude each other, or a layout that does not divide the `world` ranks.
    """
    megatron = config.backend == "megatron"
    parts = config.tensor_parallel * config.pipeline_parallel
    if not megatron and parts != 1:
        raise UserError("--tensor-parallel, --pipeline-parallel: need --backend megatron")
    if megatron and config.lora_rank:
        raise UserError("--lora-rank: needs --backend fsdp")
    if world % parts:
        raise UserError(
            f"--tensor-parallel {config.tensor_parallel} x --pipeline-parallel {config.pipeline_parallel} does not divide "
            f"the {world} processes; start a multiple of {parts} with torchrun --nproc-per-node"
        )
    return TrainerConfig(
        backend=config.backend,
        model_path=model_path,
        model=ActorModelConfig(
            precision=config.precision,
            tensor_model_parallel_size=config.tensor_parallel,
            pipeline_model_parallel_size=config.pipeline_parallel,
            gradient_checkpointing=config.gradient_checkpointing and not megatron,
            recompute_granularity="full" if config.gradient_checkpointing and megatron else None,
        ),
        optim=OptimConfig(
            lr=config.lr,
            adam_beta2=0.98,
            adam_eps=config.adam_eps,
            weight_decay=config.weight_decay,
            clip_grad=config.clip_grad,
        ),
        schedule=LrSchedConfig(lr_warmup_iters=config.warmup, lr_decay_style=config.schedule),
        total_steps=total_steps,
        lora=LoraConfig(rank=config.lora_rank, alpha=config.lora_alpha),
        seed=config.seed,
        max_tokens=config.max_tokens_per_mbs,
    )


@contextmanager
def _start_folder(config: SftConfig, lead: bool) -> Iterator[str]:
    """Yield the model to start from; random weights are written beside the output first, for as long as ranks read them."""
    from transformers import AutoModelForCausalLM

    if not config.fresh:
        yield config.start
        return
    folder = config.output.with_name(f".{config.output.name}.fresh")
    try:
        if lead:
            torch.manual_seed(config.seed)
            hf_config = load_model_config(config.fresh, "--fresh")
            fresh: Any = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, trust_remote_code=False)
            fresh.save_pretrained(folder)
        dist.barrier()
        yield str(folder)
        dist.barrier()
    finally:
        if lead:
            shutil.rmtree(folder, ignore_errors=True)


class _Report:
    """Lines about the progress."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._started, self._seen = time.perf_counter(), 0
        self._loss_sum = self._weight_sum = 0.0

    def add(self, step: int, batch: Sequence[Trajectory], loss: float, norm: float, rate: float) -> None:
        """Print what one step did now and then; the loss printed is a running mean."""
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
