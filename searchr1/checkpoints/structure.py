"""What can be said of models and checkpoints without sums: whether their files fit together, and PyTorch's own checksums."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from searchr1.errors import UserError
from searchr1.files.checksums import Damage, read_json

Advance = Callable[[int], object]
_MOST_JSON = 1 << 30
"""Tokenizers and indexes of the largest models have some tens of megabytes."""


def check_model(folder: Path, advance: Advance) -> Iterator[Damage]:
    """Yield what is wrong with a Hugging Face folder, of a model or of adapters.

    Its JSON files must be JSON; headers, sizes and the index of safetensors files must agree; weights that are pickles are
    compared with PyTorch's checksums.
    """
    for path in sorted(folder.glob("*.json")):
        try:
            read_json(path, _MOST_JSON)
        except ValueError as error:
            yield Damage(path, str(error))
        except OSError as error:
            yield Damage(path, f"cannot be read ({error.strerror})")
    pickles = sorted(folder.glob("*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        for path in pickles:
            yield from check_torch_file(path, advance)
        return
    from searchr1.checkpoints.hf_folder import INDEX, StoredWeights, read_index
    from searchr1.checkpoints.safetensors import SafetensorsReader

    try:
        if (folder / "adapter_config.json").is_file():
            SafetensorsReader(folder / "adapter_model.safetensors").close()
        else:
            with StoredWeights.open(folder) as stored:
                unnamed = sorted(stored.specs.keys() - read_index(folder / INDEX)) if (folder / INDEX).is_file() else []
            if unnamed:
                yield Damage(folder / INDEX, f"does not name {unnamed[0]}, which is in a file ({len(unnamed)} such tensors)")
    except UserError as error:
        yield named(folder, error)


def check_distributed(folder: Path, advance: Advance) -> Iterator[Damage]:
    """Yield what is wrong with a distributed checkpoint: the metadata, and each part's own checksum."""
    from searchr1.checkpoints.torch_dist import TorchDistFolder

    try:
        with closing(TorchDistFolder(folder)) as opened:
            yield from opened.damaged_parts(advance)
    except UserError as error:
        yield named(folder, error)
    for path in sorted(folder.glob("*.pt")):
        yield from check_torch_file(path, advance)


def check_ranks(folder: Path, advance: Advance) -> Iterator[Damage]:
    """Yield what is wrong with a checkpoint of one file per rank."""
    for path in sorted(folder.rglob("*.pt")):
        yield from check_torch_file(path, advance)


def check_torch_file(path: Path, advance: Advance) -> Iterator[Damage]:
    """Compare the checksums that `torch.save` stored."""
    from searchr1.checkpoints.torch_files import reject_packed

    try:
        with zipfile.ZipFile(path) as archive:
            reject_packed(archive)
            bad = archive.testzip()
        advance(path.stat().st_size)
    except (OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        yield Damage(path, f"is damaged ({error})")
    else:
        if bad is not None:
            yield Damage(path, f"is damaged (wrong checksum of {bad})")


def named(folder: Path, error: UserError) -> Damage:
    """Return an error about a folder as the damage of the file that it names."""
    text = str(error)
    path, _, problem = text.partition(" ")
    if path.startswith(str(folder)) and problem:
        return Damage(Path(path.rstrip(":")), problem)
    return Damage(folder, f"cannot be used ({text})")
