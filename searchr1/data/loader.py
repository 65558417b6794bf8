"""The order in which questions are asked; the same after a resume as without one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from searchr1.agent.trajectory import Sample
from searchr1.errors import UserError


class PromptLoader:
    """Batches of questions, a new order each epoch; the rest of an epoch that fills no batch is left out.

    The order of an epoch depends on the seed and the epoch's number alone, so that it can be taken up anywhere.

    Args:
        samples: all training questions.
        batch_size: questions per step.
        seed: of the order.
        shuffle: draw a new order each epoch; otherwise every epoch has the files' order.
        max_epochs: sets `total_steps`; `next_batch` itself goes on for as long as it is asked.

    Raises:
        UserError: fewer questions than one batch needs.
    """

    def __init__(self, samples: Sequence[Sample], batch_size: int, *, seed: int, shuffle: bool, max_epochs: int) -> None:
        if len(samples) < batch_size:
            raise UserError(
                f"data.rollout_batch_size: {batch_size} is more than the {len(samples)} training questions; lower it"
            )
        self._samples = samples
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._max_epochs = max_epochs
        self._epoch = 0
        self._position = 0
        self._fingerprint: str | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass."""
        return len(self._samples) // self._batch_size

    @property
    def total_steps(self) -> int:
        """Batches in all epochs."""
        return self.steps_per_epoch * self._max_epochs

    def next_batch(self) -> list[Sample]:
        """Return the next questions as copies, `index` numbered from 0; epochs follow each other without end."""
        if self._position >= self.steps_per_epoch:
            self._epoch += 1
            self._position = 0
        order = self._order(self._epoch)
        start = self._position * self._batch_size
        self._position += 1
        chosen = order[start : start + self._batch_size]
        return [replace(self._samples[int(row)], index=index) for index, row in enumerate(chosen)]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what the data looked like."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "batch_size": self._batch_size,
            "fingerprint": self._data_fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            UserError: the data, the shuffling or the batch size have changed, so the order would not go on.
        """
        current = self.state_dict()
        for key, name in (
            ("fingerprint", "the training questions (data.train_data_paths)"),
            ("seed", "data.seed"),
            ("shuffle", "data.shuffle"),
            ("batch_size", "data.rollout_batch_size"),
        ):
            if state.get(key) != current[key]:
                raise UserError(
                    f"cannot resume: {name} changed since the checkpoint was written; restore it, or start a new run"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if not self._shuffle:
            return np.arange(len(self._samples))
        return np.random.default_rng([self._seed % 2**64, epoch]).permutation(len(self._samples))

    def _data_fingerprint(self) -> str:
        """Return a hash of everything that training sees of the questions."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for s in self._samples:
                parts = (s.id, s.question, s.golden_answers, s.data_source, s.reward_name)
                digest.update(repr(parts).encode())
                digest.update(np.asarray(s.prompt_ids, dtype=np.int32).tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint


def eval_batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Yield every question once, in order; the last batch may be smaller."""
    for start in range(0, len(samples), batch_size):
        yield [replace(sample, index=index) for index, sample in enumerate(samples[start : start + batch_size])]
