"""The safetensors files of a Hugging Face folder, read tensor by tensor or slice by slice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from searchr1.actor.megatron.architecture import Architecture
from searchr1.actor.megatron.mapping import hugging_face_shapes
from searchr1.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HuggingFaceFolder:
    """Open files and where each tensor is. Use `open`."""

    def __init__(self, folder: Path, files: dict[str, Any], places: dict[str, str]) -> None:
        self.folder = folder
        self._files = files
        self._places = places

    @classmethod
    @contextmanager
    def open(cls, source: str | Path) -> Iterator[HuggingFaceFolder]:
        """Open a folder, or the snapshot of a hub name.

        Raises:
            UserError: no safetensors there, a file is missing, or one is cut short.
        """
        folder = local_folder(source)
        names = weight_files(folder)
        with ExitStack() as stack:
            files = {}
            for name in names:
                try:
                    files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
                except FileNotFoundError as error:
                    raise UserError(f"{folder / name} is missing; {INDEX} names it") from error
                except (SafetensorError, OSError) as error:
                    raise UserError(f"{folder / name} is damaged or cut short ({error}); download it again") from error
            places = {tensor: name for name, file in files.items() for tensor in file.keys()}  # noqa: SIM118
            yield cls(folder, files, places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self._files[self._places[name]].get_slice(name).get_shape())

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Part of a tensor along one dimension; only that part is read."""
        part = self._files[self._places[name]].get_slice(name)
        found: Tensor = part[start:stop] if dim == 0 else part[:, start:stop]
        return found

    def check(self, arch: Architecture) -> None:
        """Compare names and shapes with what the architecture has.

        Raises:
            UserError: missing, unexpected or misshapen tensors, by name.
        """
        expected = hugging_face_shapes(arch)
        found = {name: self.shape(name) for name in self._places}
        if arch.tied:  # some folders keep the tied output layer as a second copy
            found.pop("lm_head.weight", None)
        check_names(found, expected, str(self.folder))


def check_names(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Refuse what does not fit the architecture.

    Raises:
        UserError: missing, unexpected or misshapen tensors, by name.
    """
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    problems += [
        f"{name} is {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{where}: does not fit the model's config.json: {'; '.join(problems[:5])}{more}")


def local_folder(source: str | Path) -> Path:
    """A folder as it is, or the snapshot of a hub name, downloaded if need be.

    Raises:
        UserError: neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise UserError(f"{source} is neither a folder nor a model that can be downloaded ({error})") from error


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a model folder.

    Raises:
        UserError: there are none, or the index is damaged.
    """
    if (folder / INDEX).is_file():
        try:
            return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX} is damaged ({error!r}); get it again") from error
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise UserError(f"{folder}: no {SINGLE} and no {INDEX}; weights must be in safetensors files")
