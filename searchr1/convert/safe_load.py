"""`torch.save` files of other frameworks, read without running anything that they name.

Beside tensors they hold arguments, random states and classes of frameworks that are not installed here. `torch.load` reads
them with `weights_only=True`; each other name must be on the list below, and becomes an empty stand-in instead of itself.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor import _dtensor_spec as spec

from searchr1.errors import UserError

_INERT = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.(Pure)?(Posix)?Path|signal\.Signals|datetime\.timedelta"
    r"|builtins\.(getattr|complex|set|frozenset|bytearray|slice|range)"  # members of enumerations are calls of getattr
    r"|numpy\.(ndarray|dtype)|numpy\.dtypes\.\w+|numpy\._?core\.multiarray\.(_reconstruct|scalar)"
    r"|torch\.nn\.functional\.\w+|torch\._C\._nn\.\w+|collections\.(deque|defaultdict)"
    r"|(megatron|transformer_engine|omegaconf|slime|verl|rlinf)\.[\w.]+"
)
"""What checkpoints of Megatron, slime, verl and RLinf name beside tensors. None of it is needed, none of it is run."""

_OLDER_NAMES: list[tuple[Any, str]] = [
    (DTensor, "torch.distributed._tensor.api.DTensor"),
    (DTensor, "torch.distributed._tensor.DTensor"),
    (DTensor, "torch.distributed.tensor._api.DTensor"),
    *((kind, f"torch.distributed._tensor.placement_types.{kind.__name__}") for kind in (Shard, Replicate, Partial)),
    (spec.DTensorSpec, "torch.distributed._tensor.placement_types.DTensorSpec"),
    (spec.TensorMeta, "torch.distributed._tensor.placement_types.TensorMeta"),
    (spec.DTensorSpec, "torch.distributed._tensor._dtensor_spec.DTensorSpec"),
    (spec.TensorMeta, "torch.distributed._tensor._dtensor_spec.TensorMeta"),
]
"""Where earlier releases of PyTorch had the classes of sharded tensors."""


class _StandIn:
    """For anything that is named and not needed."""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        """Take anything, keep nothing."""
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Forget it."""


def load_tensors(path: Path) -> dict[str, Any]:
    """The dictionary in a file; tensors are mapped into memory and read when they are used.

    Raises:
        UserError: missing, damaged, cut short, of the format before PyTorch 1.6, or it names what has no place in it.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: the checkpoint is damaged; copy it again or use another one")
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        older = {name for _, name in _OLDER_NAMES}
        refused = sorted(name for name in named if name not in older and not _INERT.fullmatch(name))
        if refused:
            raise UserError(
                f"{path} names {', '.join(refused[:3])}, which has no place in a checkpoint and is not run; use another one"
            )
        inert = [(_StandIn, name) for name in named if _INERT.fullmatch(name)]
        with torch.serialization.safe_globals([*inert, *_OLDER_NAMES]), _no_mesh_warnings():
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise UserError(
            f"{path} is damaged, cut short or no checkpoint ({reason}); copy it again or use another one"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no dictionary: it is no checkpoint")
    return found


def check_checksums(path: Path) -> None:
    """Compare the checksums that `torch.save` stored.

    Raises:
        UserError: a part of the file has changed since.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again or use another one") from error
    if bad:
        raise UserError(f"{path} is damaged (wrong checksum of {bad}); copy it again or use another one")


@contextmanager
def _no_mesh_warnings() -> Iterator[None]:
    """Sharded tensors are put together by hand here, so the process groups that they come from are not missed."""
    mesh = logging.getLogger("torch.distributed.device_mesh")
    level = mesh.level
    mesh.setLevel(logging.ERROR)
    try:
        yield
    finally:
        mesh.setLevel(level)
