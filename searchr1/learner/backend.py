"""What a training backend does for `policy.py` and `critic.py`: the seam between algorithms and FSDP2 or Megatron-Core.

A micro-batch is trained on by `forward`, a loss of its values, and `backward`. Megatron-Core's pipeline decides itself which
stage runs what when; its backends have `run_schedule` instead, which takes the loss as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from searchr1.algorithms.entropy import TokenLogprobs
from searchr1.algorithms.sums import Sums
from searchr1.learner.packing import PackedBatch
from searchr1.learner.trainer_config import Resident

T = TypeVar("T")

PolicyLoss = Callable[[PackedBatch, TokenLogprobs], Tensor]
"""The loss of one micro-batch, a share of the mean over the whole mini-batch: sums, never means, over ranks."""

ValueLoss = Callable[[PackedBatch, Tensor], Tensor]
"""The same from a value model's [P] values, in fp32."""


class ModelPart(Protocol):
    """One rank's part of a model. Every method is a collective: all ranks call it together."""

    device: torch.device
    data_group: dist.ProcessGroup | None
    """The ranks that hold different data; None is all of them. Ranks that share a model's parts get the same data."""


class ScoringBackend(ModelPart, Protocol):
    """A language model that gives log-probabilities."""

    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        """Return log-probabilities [P] of each batch's policy tokens, on every rank, without gradients."""
        ...


class TrainingBackend(ModelPart, Protocol):
    """A model with an optimizer, whatever is on top of the decoder. Every method but the properties is a collective."""

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank: which copy of the model this process is part of; a copy trains on one share of the data."""
        ...

    @property
    def is_dp_leader(self) -> bool:
        """Whether this process is the first of its data-parallel rank, the one that takes the share."""
        ...

    def broadcast_from_dp_leader(self, value: T | None) -> T:
        """Return the leader's value on all processes of the data-parallel rank."""
        ...

    def share(self, sums: Sums) -> Sums:
        """Return sums over all data, on every rank, of what a loss collected (empty where it was not called)."""
        ...

    def clip_gradients(self, max_norm: float) -> float:
        """Scale gradients down to `max_norm`. Return the norm before, over all ranks (nan or inf if a gradient is)."""
        ...

    def step(self) -> None:
        """Update the weights once, and the learning rate."""
        ...

    def zero_grad(self) -> None:
        """Drop the gradients."""
        ...

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        ...

    @property
    def parameter_count(self) -> int:
        """Parameters of the whole model, over all ranks."""
        ...

    def named_weights(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Yield full tensors under their Hugging Face names, one at a time, a tied output layer left out.

        On ranks but the first they may be empty shells on the "meta" device.
        """
        ...

    def resident(self, kind: Resident) -> Iterator[Tensor]:
        """Yield this rank's tensors of one kind, as far as they exist now; no collective."""
        ...

    def save(self, folder: Path, in_background: bool = False) -> None:
        """Write everything that `load` needs to go on exactly here.

        In the background: returns once the state is copied; training may go on, and `finish_save` must follow.
        """
        ...

    def finish_save(self) -> None:
        """Wait until a save in the background has been written; do nothing without one."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from `save`, also in another layout."""
        ...


class PolicyBackend(ScoringBackend, TrainingBackend, Protocol):
    """A policy that is trained a micro-batch at a time."""

    def forward(self, batch: PackedBatch, temperature: float, with_entropy: bool) -> TokenLogprobs:
        """Return log-probabilities [P] of the policy tokens, and their entropies, with gradients."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add up the gradients of a micro-batch's loss over ranks."""
        ...

    def named_adapters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield LoRA's matrices, full tensors under peft's names, one at a time; nothing where all weights are trained."""
        ...


@runtime_checkable
class PolicySchedule(Protocol):
    """A policy whose backend runs its micro-batches itself."""

    def run_schedule(self, batches: Sequence[PackedBatch], temperature: float, with_entropy: bool, loss: PolicyLoss) -> None:
        """Add up the gradients of `loss` over batches and ranks. Ranks without the model's output do not call it."""
        ...


class ScheduledPolicyBackend(ScoringBackend, TrainingBackend, PolicySchedule, Protocol):
    """A policy on Megatron-Core."""

    def named_adapters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """See `PolicyBackend`."""
        ...


class ValueBackend(TrainingBackend, Protocol):
    """A critic: a decoder with a scalar head that starts at 0, trained a micro-batch at a time."""

    def values(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Return [P] of each batch's policy tokens: the value of the state before it; on every rank, without gradients."""
        ...

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return values [P] in fp32, with gradients."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add up the gradients of a micro-batch's loss over ranks."""
        ...


@runtime_checkable
class ValueSchedule(Protocol):
    """A critic whose backend runs its micro-batches itself."""

    def run_schedule(self, batches: Sequence[PackedBatch], loss: ValueLoss) -> None:
        """Add up the gradients of `loss` over batches and ranks. Ranks without the model's output do not call it."""
        ...


class ScheduledValueBackend(TrainingBackend, ValueSchedule, Protocol):
    """A critic on Megatron-Core."""

    def values(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """See `ValueBackend`."""
        ...


AnyPolicyBackend = PolicyBackend | ScheduledPolicyBackend
AnyValueBackend = ValueBackend | ScheduledValueBackend
