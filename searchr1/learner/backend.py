"""What a training backend does for `policy.py` and `critic.py`: the seam between algorithms and FSDP2 or Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from searchr1.algorithms.entropy import TokenLogprobs
from searchr1.algorithms.sums import Sums
from searchr1.learner.packing import PackedBatch

T = TypeVar("T")

Resident = Literal["weight", "optimizer", "grad"]
"""Groups of tensors that can leave the GPU between phases: `actor.offload_*`."""

MicroBatchLoss = Callable[[PackedBatch, TokenLogprobs], Tensor]
"""The loss of one micro-batch, a share of the mean over the whole mini-batch: sums, never means, over ranks."""

ValueLoss = Callable[[PackedBatch, Tensor], Tensor]
"""The same from a value model's [P] values, in fp32."""


class ModelPart(Protocol):
    """One rank's part of a model. Every method is a collective: all ranks call it together."""

    device: torch.device
    data_group: dist.ProcessGroup | None
    """The ranks that hold different data; None is all of them. Ranks that share a model's parts get the same data."""


class ScoringBackend(ModelPart, Protocol):
    """Of a language model."""

    def forward(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        """Log-probabilities [P] of each batch's policy tokens, on every rank, without gradients."""
        ...


class TrainingBackend(ModelPart, Protocol):
    """With an optimizer, whatever is on top of the decoder. Every method but the properties is a collective."""

    @property
    def replica(self) -> int:
        """Which copy of the model this rank is part of; a copy trains on one share of the data."""
        ...

    @property
    def leads_replica(self) -> bool:
        """Whether this rank is the first of its copy, the one that is handed the share."""
        ...

    def to_replica(self, value: T | None) -> T:
        """What the replica's first rank has, on all its ranks."""
        ...

    def share(self, sums: Sums) -> Sums:
        """Sums over all data, on every rank, from what a loss collected (empty where it was not called)."""
        ...

    def clip_gradients(self, max_norm: float) -> float:
        """Scale gradients down to `max_norm`. Returns the norm before, over all ranks (nan or inf if a gradient is)."""
        ...

    def step(self) -> None:
        """One update of the weights, and of the learning rate."""
        ...

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        ...

    @property
    def parameter_count(self) -> int:
        """Of the whole model, over all ranks."""
        ...

    def named_weights(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under their Hugging Face names, one at a time, a tied output layer left out.

        On ranks but the first they may be empty shells on the "meta" device.
        """
        ...

    def resident(self, kind: Resident) -> Iterator[Tensor]:
        """This rank's tensors of one kind, as far as they exist now; no collective."""
        ...

    def save(self, folder: Path, in_background: bool = False) -> None:
        """Write everything that `load` needs to go on exactly here.

        In the background: returns once the state is copied; training may go on, and `finish_save` must follow.
        """
        ...

    def finish_save(self) -> None:
        """Wait until a save in the background has been written; does nothing without one."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from `save`, also in another layout."""
        ...


class Backend(ScoringBackend, TrainingBackend, Protocol):
    """A policy."""

    def forward_backward(
        self, batches: Sequence[PackedBatch], temperature: float, with_entropy: bool, loss: MicroBatchLoss
    ) -> None:
        """Add up the gradients of `loss` over batches and ranks. Ranks without the model's output do not call it."""
        ...

    def named_adapters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """LoRA's matrices, full tensors under peft's names, one at a time; nothing where all weights are trained."""
        ...


class ValueBackend(TrainingBackend, Protocol):
    """A critic: a decoder with a scalar head that starts at 0."""

    def values(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """[P] of each batch's policy tokens: the value of the state before it; on every rank, without gradients."""
        ...

    def forward_backward(self, batches: Sequence[PackedBatch], loss: ValueLoss) -> None:
        """As `Backend` does."""
        ...
