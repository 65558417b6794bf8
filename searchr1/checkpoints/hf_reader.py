"""The safetensors files of a local Hugging Face folder, read by plain reads (see safetensors_file.py for why)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from searchr1.checkpoints.hf_folder import check_shapes, weight_files
from searchr1.checkpoints.mapping import hugging_face_shapes
from searchr1.checkpoints.model_shape import ModelShape
from searchr1.checkpoints.safetensors import SafetensorsReader, TensorSpec


class HfReader:
    """Open files and which tensor is in which. Use `open`."""

    def __init__(self, folder: Path, files: list[SafetensorsReader]) -> None:
        self.folder = folder
        self.specs: dict[str, TensorSpec] = {name: spec for file in files for name, spec in file.specs.items()}
        self._files = {name: file for file in files for name in file.specs}

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[HfReader]:
        """Open every file that the index names, or the only one.

        Raises:
            UserError: no safetensors there, or a file is missing or damaged, by name.
        """
        with ExitStack() as stack:
            files = []
            for name in weight_files(folder):
                files.append(SafetensorsReader(folder / name))
                stack.callback(files[-1].close)
            yield cls(folder, files)

    def check(self, arch: ModelShape) -> None:
        """Compare names and shapes with what the architecture has; a second copy of a tied output layer must equal it.

        Raises:
            UserError: missing, unexpected or misshapen tensors, by name.
        """
        self.check_shapes(hugging_face_shapes(arch), arch.tied)

    def check_shapes(self, expected: dict[str, tuple[int, ...]], tied: bool) -> None:
        """Compare names and shapes with those of a model, a tied output layer left out of `expected`.

        Raises:
            UserError: missing, unexpected or misshapen tensors, by name; two different output layers.
        """
        found = {name: spec.shape for name, spec in self.specs.items()}
        check_shapes(found, expected, str(self.folder), tied=tied, read=self.read)

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Part of a tensor along one dimension."""
        return self._files[name].read(name, dim, start, stop)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.read(name, 0, 0, self.specs[name].shape[0])

    def dtype(self) -> torch.dtype:
        """The precision of most of the elements."""
        return main_dtype(list(self.specs.values()))


def main_dtype(specs: list[TensorSpec]) -> torch.dtype:
    """The precision that takes the most bytes; a configuration names one, though norms may be kept in another."""
    totals: dict[torch.dtype, int] = {}
    for spec in specs:
        totals[spec.dtype] = totals.get(spec.dtype, 0) + spec.nbytes
    return max(totals, key=lambda dtype: totals[dtype])
