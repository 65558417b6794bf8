"""Buffers in shared memory, for weights on their way between processes of one node."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from pathlib import Path

import torch
from torch import Tensor

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all CUDA contexts."""


class SharedBuffer:
    """A mapped file of fixed size."""

    def __init__(self, descriptor: int, path: str, size: int) -> None:
        """Map the file; the descriptor may be closed afterwards. Use `create` or `attach`."""
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        mapped = mmap.mmap(descriptor, size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        self.path = path
        self.size = size
        # The tensor keeps the mapping alive: nobody can be left with a view of memory that is gone.
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)
        self._registered = False

    @classmethod
    def create(cls, path: Path, size: int) -> SharedBuffer:
        """Make a file of `size` bytes, all of them reserved: a mapping of a file without room ends the process later.

        Raises:
            OSError: it exists, cannot be written, or there is no room.
        """
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            return cls(descriptor, str(path), size)
        finally:
            os.close(descriptor)

    @classmethod
    def attach(cls, path: str) -> SharedBuffer:
        """Map a file that another process of this user made.

        Raises:
            OSError: it is gone, or it is not an ordinary file of this user.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "not an ordinary file of this user", path)
            return cls(descriptor, path, found.st_size)
        finally:
            os.close(descriptor)

    def view(self, dtype: torch.dtype, offset: int, elements: int) -> Tensor:
        """[elements] of the buffer from byte `offset` on.

        Raises:
            ValueError: they lie outside of it, or are not aligned.
        """
        stop = offset + elements * dtype.itemsize
        if offset < 0 or elements < 0 or stop > self.size or offset % dtype.itemsize:
            raise ValueError(
                f"{elements} elements of {dtype} at byte {offset} do not fit into {self.path} of {self.size} bytes"
            )
        return self._bytes[offset:stop].view(dtype)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether the tensor's memory is (part of) this buffer's."""
        if tensor.device.type != "cpu":
            return False
        start = self._bytes.data_ptr()
        return start <= tensor.data_ptr() < start + self.size

    def register(self) -> str:
        """Pin the pages for CUDA, so that copies to and from a GPU are direct. Returns the reason if that failed.

        Copies are right without it, and several times slower.
        """
        code = int(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self.size, _PORTABLE))
        self._registered = code == 0
        if self._registered:
            return ""
        # The failure stays CUDA's "last error" and would be blamed on the next kernel, unless it is read here.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")
        return (
            f"weight sync: CUDA cannot pin {self.path} ({self.size >> 20} MiB; cudaHostRegister: error {code}), which makes "
            "it slower; let the container lock memory (docker: --ulimit memlock=-1)"
        )

    def close(self) -> None:
        """Unpin the pages; they are unmapped as soon as no tensor uses them. Closing twice does no harm."""
        if self._registered:
            self._registered = False
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr()))
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self.size = 0
