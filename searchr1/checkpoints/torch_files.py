"""`torch.save` files, read without running anything that they name, and without more memory than they are worth.

Beside tensors they hold arguments, random states and classes of frameworks that are not installed here. A first reading
(`check`, with the reader of pickles.py) makes nothing but stand-ins: each name must be on a list, and every tensor must lie
within what is stored. Only then does `torch.load` read the file, with `weights_only=True` and stand-ins for what it does not
know. The archive is looked at too: torch stores its parts as they are, so a packed part is not part of a checkpoint.
"""

from __future__ import annotations

import io
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor import _dtensor_spec as spec

from searchr1.checkpoints.pickles import Call, Mapping, Reader, StandIn, call, container
from searchr1.errors import UserError
from searchr1.files.lfs import reject_pointer

_MAX_PICKLE = 32 << 20
"""The most bytes of the part that describes the tensors: thousands of them need a megabyte."""
_MAX_PARTS = 200_000
_MAX_DIMS = 64
_ARCHIVE = b"PK\x03\x04"

_INERT = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.(Pure)?(Posix)?Path|signal\.Signals|datetime\.timedelta"
    r"|builtins\.(getattr|complex|frozenset|slice|range)"  # members of enumerations are calls of getattr
    r"|numpy\.(ndarray|dtype)|numpy\.dtypes\.\w+|numpy\._?core\.multiarray\.(_reconstruct|scalar)"
    r"|torch\.nn\.functional\.\w+|torch\._C\._nn\.\w+|collections\.(deque|defaultdict)"
    r"|(megatron|transformer_engine|omegaconf|slime|verl|rlinf)\.[\w.]+"
)
"""What checkpoints of Megatron, slime, verl and RLinf name beside tensors. None of it is needed, none of it is run."""
_HARMLESS = re.compile(
    r"torch\.distributed\.(tensor|_tensor|device_mesh|_mesh_layout|_pycute)\.[\w.]+"
    r"|torch\._utils\._rebuild_wrapper_subclass|torch\.serialization\._get_layout|torch\.device"
)
"""What `torch.load` makes itself, of no size: sharded tensors, devices, layouts."""
_KINDS = re.compile(r"torch\.nn\.parameter\.Parameter|torch\.Tensor|torch\._C\._TensorBase")
"""Classes that are named beside a tensor, and not called."""

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


def load_tensors(path: Path) -> dict[str, Any]:
    """Return the dictionary in a file; tensors are mapped into memory and read when they are used.

    Raises:
        UserError: missing, damaged, cut short, of the format before PyTorch 1.6, or it names what has no place in it.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: the checkpoint is damaged; copy it again or use another one")
    reject_pointer(path)
    try:
        with path.open("rb") as file:
            inert = check(file)
        found = load(str(path), inert, mmap=True)
    except HasNoPlaceError as error:
        raise UserError(f"{path} {error}; use another one") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{path} is damaged, cut short or no checkpoint ({_reason(error)}); copy it again or use another one"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no dictionary: it is not a checkpoint")
    return found


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a model's file (`pytorch_model.bin`), mapped into memory where the format allows it.

    Raises:
        UserError: damaged, cut short, or it holds more than tensors.
    """
    mapped = check_weights(path)
    try:
        found = load(str(path), set(), mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        raise _damaged_weights(path, error) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} holds no dictionary of tensors; save the model with save_pretrained")
    return found


def check_weights(path: Path) -> bool:
    """Check a model's file without reading its tensors; returns whether they can be mapped into memory.

    Raises:
        UserError: damaged, or it holds more than tensors.
    """
    reject_pointer(path)
    try:
        with path.open("rb") as file:
            inert = check(file, old=True)
            file.seek(0)
            mapped = file.read(4) == _ARCHIVE
        if inert:
            raise HasNoPlaceError(f"names {', '.join(sorted(inert)[:3])}, which has no place in a model")
    except Exception as error:  # a damaged pickle can raise anything
        raise _damaged_weights(path, error) from error
    return mapped


def _damaged_weights(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged, cut short or holds more than tensors ({_reason(error)}); get it again")


def load(file: Any, inert: set[str], *, mmap: bool = False) -> Any:
    """Return what a file holds that `check` has passed; `inert` is what that returned."""
    with _standing_in(inert), _no_mesh_warnings():
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


@contextmanager
def _standing_in(inert: set[str]) -> Iterator[None]:
    """Let `torch.load` make stand-ins of these names, whatever libraries in this process have said that they are."""
    before: list[Any] = torch.serialization.get_safe_globals()
    others = [known for known in before if _name_of(known) not in inert]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*others, *((StandIn, name) for name in inert), *_OLDER_NAMES])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _name_of(known: Any) -> str:
    """Return the name that a pickle gives to something that `torch.load` may make."""
    return str(known[1]) if isinstance(known, tuple) else f"{known.__module__}.{known.__qualname__}"


def load_part(file: IO[bytes]) -> Any:
    """Return what one part of a distributed checkpoint holds: a tensor, or a small object.

    Raises:
        HasNoPlaceError, ValueError and others: it is damaged, or no such part.
    """
    inert = check(file)
    file.seek(0)
    return load(file, inert)


class HasNoPlaceError(ValueError):
    """A file asks for something that it must not have."""


def check(file: IO[bytes], *, old: bool = False) -> set[str]:
    """Read what describes the tensors of a `torch.save` archive, and compare it with what is stored.

    `old`: accept the format before PyTorch 1.6 too.

    Returns the names that `torch.load` is to be given stand-ins for.

    Raises:
        HasNoPlaceError: it names what is not run.
        ValueError: it is no such archive, a part is packed, or a tensor claims more than is stored.
        Exception: a damaged pickle can raise anything.
    """
    file.seek(0, 2)
    length = file.tell()
    file.seek(0)
    if file.read(4) == _ARCHIVE:
        sizes, data = _archive(file, length)
        return _describe(_TensorReader(data, lambda key: sizes.get(f"data/{key}")))
    if not old:
        raise ValueError("it is not an archive of torch.save")
    file.seek(0)
    # Four pickles in a row (a magic number, a version, the machine, the tensors), then the bytes of the tensors.
    source = io.BytesIO(file.read(_MAX_PICKLE))
    if Reader(source, _nothing).load() != torch.serialization.MAGIC_NUMBER:
        raise ValueError("it is not a file of torch.save")
    for _ in range(2):
        Reader(source, _nothing).load()
    return _describe(_OldReader(source, length))


def _nothing(module: str, name: str, reader: Reader) -> Any:
    return None


def _describe(reader: _TensorReader) -> set[str]:
    try:
        reader.load()
    except pickle.UnpicklingError as error:
        if reader.rejected:
            raise HasNoPlaceError(
                f"names {', '.join(reader.rejected)}, which has no place in a checkpoint and is not run"
            ) from error
        raise
    return reader.inert


def _archive(file: IO[bytes], length: int) -> tuple[dict[str, int], bytes]:
    """Return the sizes of a zip file's parts, by their names below its folder, and its pickle."""
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        if not infos or len(infos) > _MAX_PARTS or archive.comment:
            raise ValueError("it is not an archive of torch.save")
        reject_packed(archive)
        prefix = infos[0].filename.partition("/")[0] + "/"
        sizes: dict[str, int] = {}
        for info in infos:
            name = info.filename.removeprefix(prefix)
            if not info.filename.startswith(prefix) or name.lower() in sizes:
                raise ValueError("its parts have names that torch.save does not give")
            if info.header_offset < 0 or info.header_offset + 30 + info.file_size > length:
                raise ValueError(f"its part {name[:60]} is longer than the file")
            sizes[name.lower()] = info.file_size
        if sum(sizes.values()) > length:
            raise ValueError("its parts are longer than the file")
        if sizes.get("data.pkl", _MAX_PICKLE + 1) > _MAX_PICKLE:
            raise ValueError("it does not describe its tensors, or in too many words")
        return sizes, archive.read(prefix + "data.pkl")


def reject_packed(archive: zipfile.ZipFile) -> None:
    """Reject an archive whose parts take more room when they are read.

    Raises:
        ValueError: there is one.
    """
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise ValueError(f"its part {info.filename[:60]} is packed, which torch.save does not do")


class _Storage:
    """Bytes that are stored, of elements of a type (None: bytes)."""

    __slots__ = ("dtype", "nbytes")

    def __init__(self, dtype: torch.dtype | None, nbytes: int) -> None:
        self.dtype, self.nbytes = dtype, nbytes


class _StorageKind:
    """A class of storages."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype


class _Kind:
    """A class that is named and not called."""

    __slots__ = ()


class _TensorReader(Reader):
    """Makes stand-ins of everything, and looks at the sizes."""

    def __init__(self, data: bytes | io.BytesIO, size_of: Callable[[str], int | None]) -> None:
        super().__init__(data, self._find_name)
        self._size_of = size_of
        self._storages: dict[str, tuple[torch.dtype | None, int]] = {}
        self.inert: set[str] = set()
        self.rejected: list[str] = []
        self._calls: dict[str, Call] = {
            "torch._utils._rebuild_tensor": Call(self._tensor),
            "torch._utils._rebuild_tensor_v2": Call(self._tensor_v2),
            "torch._utils._rebuild_tensor_v3": Call(self._tensor_v3),
            "torch._utils._rebuild_parameter": Call(lambda data, *_: data),
            "torch._utils._rebuild_parameter_with_state": Call(lambda data, *_: data),
            "torch._tensor._rebuild_from_type_v2": Call(lambda function, _, arguments, *__: call(function, arguments)),
            "torch.Size": Call(_counts),
            "collections.OrderedDict": container(Mapping, self),
            "builtins.set": container(set, self),
            "builtins.bytearray": Call(self._bytes),
            "_codecs.encode": Call(self._encode),
        }

    def _find_name(self, module: str, name: str, _: Reader) -> Any:
        full = f"{module}.{name}"
        if full in self._calls:
            return self._calls[full]
        if module in ("torch", "torch.storage", "torch.cuda") and name.endswith("Storage"):
            if name == "UntypedStorage":
                return _StorageKind(None)
            with suppress(KeyError):
                return _StorageKind(torch.serialization.StorageType(name).dtype)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if _KINDS.fullmatch(full):
            return _Kind()
        if _HARMLESS.fullmatch(full):
            return StandIn
        if _INERT.fullmatch(full):
            self.inert.add(full)
            return StandIn
        self.rejected.append(full[:100])
        return None

    def persistent_load(self, pid: Any) -> _Storage:
        """Return what stands for a stored part, which must be as long as it claims."""
        if type(pid) is not tuple or len(pid) != 5 or _text(pid[0]) != "storage" or type(pid[1]) is not _StorageKind:
            raise pickle.UnpicklingError("refers to something that is not stored")
        dtype, key, count = pid[1].dtype, _text(pid[2]), pid[4]
        stored = self._size_of(key)
        if type(count) is not int or stored is None or count * (dtype.itemsize if dtype else 1) != stored:
            raise pickle.UnpicklingError(f"claims {count} elements of what is not stored or of another size")
        if self._storages.setdefault(key, (dtype, count)) != (dtype, count):
            raise pickle.UnpicklingError("reads the same bytes in two ways")
        return _Storage(dtype, stored)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> StandIn:
        if type(storage) is not _Storage:
            raise pickle.UnpicklingError("has a tensor of something that is not stored")
        kind = storage.dtype or dtype
        size, stride = _counts(size), _counts(stride)
        if kind is None or type(offset) is not int or offset < 0 or len(size) != len(stride):
            raise pickle.UnpicklingError("has a tensor without a shape or a type")
        room = storage.nbytes // kind.itemsize
        if all(size):
            last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
            if last >= room or math.prod(size) > room:
                raise pickle.UnpicklingError(f"has a tensor {tuple(size)} of {room} stored elements")
        return StandIn()

    def _tensor_v2(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> StandIn:
        return self._tensor(storage, offset, size, stride)

    def _tensor_v3(self, storage: Any, offset: Any, size: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any) -> Any:
        if type(dtype) is not torch.dtype:
            raise pickle.UnpicklingError("has a tensor without a type")
        return self._tensor(storage, offset, size, stride, dtype)

    def _bytes(self, *arguments: Any) -> bytes:
        if arguments and type(arguments[0]) not in (bytes, str):
            raise pickle.UnpicklingError("makes bytes of something else")
        self.count(len(arguments[0]) if arguments else 0)
        return b""

    def _encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        if type(text) is not str or _text(encoding) not in ("latin1", "latin-1", "utf-8", "ascii"):
            raise pickle.UnpicklingError("makes bytes of something else")
        self.count(len(text))
        return text.encode(_text(encoding))


class _OldReader(_TensorReader):
    """The archive of the format before PyTorch 1.6, in which the tensors' bytes follow."""

    def __init__(self, source: io.BytesIO, length: int) -> None:
        super().__init__(source, lambda key: None)
        self._room = length

    def persistent_load(self, pid: Any) -> _Storage:
        """Return what stands for bytes that follow; all together must not be longer than the file."""
        if type(pid) is not tuple or len(pid) != 6 or _text(pid[0]) != "storage" or type(pid[1]) is not _StorageKind:
            raise pickle.UnpicklingError("refers to something that is not stored")
        dtype, key, count = pid[1].dtype, _text(pid[2]), pid[4]
        if dtype is None or pid[5] is not None or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("has a part without a type or a size")
        if key not in self._storages:
            self._room -= count * dtype.itemsize
        if self._room < 0 or self._storages.setdefault(key, (dtype, count)) != (dtype, count):
            raise pickle.UnpicklingError("claims more elements than are stored")
        return _Storage(dtype, count * dtype.itemsize)


def _text(value: Any) -> str:
    return value.decode("latin1") if type(value) is bytes else value if type(value) is str else ""


def _counts(items: Any = ()) -> tuple[int, ...]:
    """Return what must be non-negative numbers, not too many; of a class that no pickle can make."""
    if type(items) not in (list, tuple, torch.Size) or len(items) > _MAX_DIMS:
        raise pickle.UnpicklingError("has a shape that is none")
    if not all(type(item) is int and 0 <= item < 1 << 62 for item in items):
        raise pickle.UnpicklingError("has a shape that is none")
    return torch.Size(items)


def check_checksums(path: Path) -> None:
    """Compare the checksums that `torch.save` stored.

    Raises:
        UserError: a part of the file has changed since.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            reject_packed(archive)
            bad = archive.testzip()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again or use another one") from error
    if bad:
        raise UserError(f"{path} is damaged (wrong checksum of {bad}); copy it again or use another one")


def _reason(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


@contextmanager
def _no_mesh_warnings() -> Iterator[None]:
    """Silence warnings about process groups: sharded tensors are put together by hand here."""
    mesh = logging.getLogger("torch.distributed.device_mesh")
    level = mesh.level
    mesh.setLevel(logging.ERROR)
    try:
        yield
    finally:
        mesh.setLevel(level)
