"""Counts what would make the host wait for a GPU, on a CPU."""

from __future__ import annotations

import contextlib
import traceback
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """What would make the host wait for a GPU: reads of a tensor's values, and shapes that depend on them."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2", "unique_consecutive")
    METHODS = ("tolist", "numpy", "cpu")  # on a CPU these never reach the dispatcher

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.OPERATIONS:
            self._keep(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        for name in self.METHODS:
            original = getattr(torch.Tensor, name)
            watched = lambda tensor, *args, name=name, original=original, **kwargs: (  # noqa: E731
                self._keep(name),
                original(tensor, *args, **kwargs),
            )[1]
            self.stack.enter_context(mock.patch.object(torch.Tensor, name, watched))
        return super().__enter__()

    def __exit__(self, *error):
        self.stack.close()
        return super().__exit__(*error)

    def _keep(self, name: str) -> None:
        frames = [f"{f.filename.split('site-packages/')[-1]}:{f.lineno}" for f in traceback.extract_stack()[-9:-2]]
        self.found.append(f"{name} in {' < '.join(reversed(frames))}")
