"""Tensors that wait in host memory while another model uses the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Offload:
    """Tensors whose storages move out and back in place: views, parameters and optimizers keep pointing at them.

    Between `out` and `back` the tensors have no memory; touching one is an error in torch.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], keep: bool = True) -> None:
        """Take a function that gives the tensors at each `out`, because optimizers make theirs late.

        Args:
            tensors: what to move; views of one storage may come more than once.
            keep: False frees the memory and gives back zeros (gradients between two steps).
        """
        self._tensors = tensors
        self._keep = keep
        self._outside: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []
        self._host: dict[int, Tensor] = {}  # by address of the storage object: reused, since pinning memory is slow

    @property
    def is_out(self) -> bool:
        """Whether the tensors are without memory now."""
        return bool(self._outside)

    def out(self) -> int:
        """Free the device's memory. Return the bytes freed; 0 if they are out already."""
        if self.is_out:
            return 0
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self._tensors()}
        freed = 0
        for storage in storages.values():
            size = storage.nbytes()
            if size == 0:
                continue
            copy = self._copy_of(storage) if self._keep else None
            self._outside.append((storage, size, copy))
            freed += size
        if any(copy is not None and copy.is_pinned() for _, _, copy in self._outside):
            torch.cuda.synchronize()  # the copies run on their own
        for storage, _, _ in self._outside:
            storage.resize_(0)
        return freed

    def back(self) -> None:
        """Give the tensors their memory and contents again; do nothing if they are not out."""
        for storage, size, copy in self._outside:
            storage.resize_(size)
            contents = _as_bytes(storage)
            if copy is None:
                contents.zero_()
            else:
                contents.copy_(copy, non_blocking=True)
        self._outside = []

    def _copy_of(self, storage: torch.UntypedStorage) -> Tensor:
        size = storage.nbytes()
        host = self._host.get(storage._cdata)
        if host is None or host.numel() != size:
            host = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
            self._host[storage._cdata] = host
        return host.copy_(_as_bytes(storage), non_blocking=True)


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
