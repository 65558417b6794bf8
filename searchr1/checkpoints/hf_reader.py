"""The weights of a Hugging Face folder: names, shapes and precisions from headers, and slices by plain reads.

Plain reads, because the pages of a memory map would count as this process's memory, all of the model's in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from searchr1.checkpoints.hf_folder import HEADS, INDEX, OUTPUT_LAYER, SINGLE, check_shapes, read_index, weight_files
from searchr1.checkpoints.mapping import VALUE_HEAD, hugging_face_shapes
from searchr1.checkpoints.model_shape import ModelShape
from searchr1.checkpoints.safetensors import SafetensorsReader, TensorSpec
from searchr1.checkpoints.torch_files import load_weights
from searchr1.errors import UserError

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class StoredWeights:
    """Open files and which tensor is in which. Use `open`."""

    def __init__(self, folder: Path, files: dict[str, SafetensorsReader], tensors: dict[str, Tensor]) -> None:
        self.folder = folder
        self.specs = {name: file.specs[name] for name, file in files.items()}
        self.specs |= {name: TensorSpec(name, tuple(value.shape), value.dtype) for name, value in tensors.items()}
        self._files, self._tensors = files, tensors

    @classmethod
    @contextmanager
    def open(cls, folder: Path, *, pickles: bool = True) -> Iterator[StoredWeights]:
        """Read the headers of the safetensors files, or of `pytorch_model.bin` where there are none.

        Args:
            folder: of the model.
            pickles: False rejects `pytorch_model.bin`.

        Raises:
            UserError: no weights; a file is missing, cut short, unsafe or holds another's tensor, by name.
        """
        if pickles and not _has_safetensors(folder) and _has_pickles(folder):
            yield cls(folder, {}, _read_pickles(folder))
            return
        with ExitStack() as stack:
            files: dict[str, SafetensorsReader] = {}
            for file in weight_files(folder):
                try:
                    reader = SafetensorsReader(folder / file)
                except UserError as error:
                    hint = f"; {INDEX} names it" if not (folder / file).exists() else ""
                    raise UserError(f"{error}{hint}") from error
                stack.callback(reader.close)
                for name in reader.specs:
                    if name in files:
                        raise UserError(
                            folder, f"{name} is in both {files[name].path.name} and {file}; get the folder again"
                        )
                    files[name] = reader
            if (folder / INDEX).is_file():
                _check_index(folder, {name: reader.path.name for name, reader in files.items()})
            yield cls(folder, files, {})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        return {name: spec.shape for name, spec in self.specs.items()}

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return part of a tensor along one dimension; only that part is read."""
        if name in self._tensors:
            return self._tensors[name].narrow(dim, start, stop - start)
        return self._files[name].read(name, dim, start, stop)

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor."""
        return self.read(name, 0, 0, self.specs[name].shape[0])

    def dtype(self) -> torch.dtype:
        """Return the precision of most of the bytes."""
        return main_dtype(list(self.specs.values()))

    def check(self, arch: ModelShape) -> None:
        """Compare names and shapes with a model's; of a critic's, whose head is new, the decoder alone.

        Raises:
            UserError: missing, unexpected or misshapen tensors, by name; an output layer that should be the embedding.
        """
        expected = {name: shape for name, shape in hugging_face_shapes(arch).items() if name != VALUE_HEAD}
        allowed = (OUTPUT_LAYER, *HEADS) if arch.value_head else ()
        self.check_shapes(expected, tied=arch.tied and not arch.value_head, allowed=allowed)

    def check_shapes(self, expected: dict[str, tuple[int, ...]], *, tied: bool, allowed: tuple[str, ...] = ()) -> None:
        """Compare names and shapes as `hf_folder.check_shapes` does.

        Raises:
            UserError: missing, unexpected or misshapen tensors, by name; an output layer that should be the embedding.
        """
        check_shapes(self.shapes, expected, str(self.folder), tied=tied, read=self.read, allowed=allowed)


def main_dtype(specs: list[TensorSpec]) -> torch.dtype:
    """Return the precision that takes the most bytes; a configuration names one, though norms may be kept in another."""
    totals: dict[torch.dtype, int] = {}
    for spec in specs:
        totals[spec.dtype] = totals.get(spec.dtype, 0) + spec.nbytes
    return max(totals, key=lambda dtype: totals[dtype])


def has_weights(folder: Path) -> bool:
    """Return whether there are weights in a format that is read."""
    return _has_safetensors(folder) or _has_pickles(folder)


def _has_safetensors(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def _has_pickles(folder: Path) -> bool:
    return (folder / PICKLED).is_file() or (folder / PICKLED_INDEX).is_file()


def _read_pickles(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of `pytorch_model.bin` files, mapped into memory; nothing in them is run."""
    files = [PICKLED]
    if (folder / PICKLED_INDEX).is_file():
        files = sorted(set(read_index(folder / PICKLED_INDEX).values()))
    found: dict[str, Tensor] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path} is missing; {PICKLED_INDEX} names it")
        part = load_weights(path)
        for name in part:
            if name in found:
                raise UserError(f"{folder}: {name} is in two files; get the folder again")
        found |= part
    return found


def _check_index(folder: Path, places: dict[str, str]) -> None:
    wrong = [name for name, file in read_index(folder / INDEX).items() if places.get(name) != file]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{folder / INDEX} does not fit its files: {', '.join(wrong[:3])}{more} not where it lists them; get the folder "
            "again"
        )
