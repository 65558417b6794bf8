"""Pickles that would create an empty file if anything in them were run, and pickles that ask for far too much.

Each makes a whole pickle of `marker`, the file that would be created.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Reduced:
    """Pickled as a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def command(marker: Path) -> str:
    return f"touch {marker}"


def dumped(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol)


def laughs(levels: int) -> bytes:
    """Nested pairs, each of the one before twice: 2**levels leaves in a few bytes, hashed at the end."""
    data = b"\x80\x02K\x01q\x00"
    for level in range(levels):
        data += b"0h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return b"\x80\x02}" + data[2:] + b"Ns."


def _array(marker: Path) -> bytes:
    array = np.empty(1, dtype=object)
    array[0] = Reduced(exec, code(marker))
    return dumped(array)


RUN: dict[str, Callable[[Path], bytes]] = {
    "global, protocol 0": lambda m: b"cos\nsystem\n(S'" + command(m).encode() + b"'\ntR.",
    "global of posix": lambda m: b"\x80\x02cposix\nsystem\n" + text(command(m)) + b"\x85R.",
    "stack global, protocol 4": lambda m: b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text(command(m)) + b"\x85R.",
    "protocol 5 in a frame": lambda m: dumped(Reduced(exec, code(m)), 5),
    "eval": lambda m: dumped(Reduced(eval, code(m))),
    "python 2's name of exec": lambda m: b"\x80\x02c__builtin__\nexec\n" + text(code(m)) + b"\x85R.",
    "instance": lambda m: b"(S'" + command(m).encode() + b"'\nios\nsystem\n.",
    "object": lambda m: b"(cos\nsystem\nS'" + command(m).encode() + b"'\no.",
    "getattr of a module": lambda m: b"\x80\x02cbuiltins\ngetattr\nc__builtin__\n__import__\n" + text("os") + b"\x85R"
    + text("system") + b"\x86R" + text(command(m)) + b"\x85R.",
    "a pickle in a pickle": lambda m: dumped(Reduced(pickle.loads, dumped(Reduced(exec, code(m))))),
    "a partial": lambda m: b"\x80\x02cfunctools\npartial\ncos\nsystem\n" + text(command(m)) + b"\x86R)R.",
    "an array of objects": _array,
    "in a permitted container": lambda m: b"\x80\x02ccollections\nOrderedDict\n]" + dumped(Reduced(exec, code(m)))[2:-1]
    + b"a\x85R.",
    "as a dictionary's key": lambda m: b"\x80\x02}" + dumped(Reduced(exec, code(m)))[2:-1] + b"K\x01s.",
    "the state of a permitted class": lambda m: b"\x80\x02ccollections\nOrderedDict\n)R}" + text("items")
    + dumped(Reduced(exec, code(m)))[2:-1] + b"sb.",
    "a persistent id": lambda m: b"\x80\x02" + dumped(Reduced(exec, code(m)))[2:-1] + b"Q.",
}  # fmt: skip
"""By what they do. Plain unpickling runs each of them."""

REFUSED: dict[str, bytes] = {
    "new object": b"\x80\x02csubprocess\nPopen\n(" + text("true") + b"l\x85\x81.",
    "new object with keywords": b"\x80\x04csubprocess\nPopen\n)}" + text("args") + text("true") + b"s\x92.",
    "getattr of an enumeration": b"\x80\x02cbuiltins\ngetattr\ncsignal\nSignals\n" + text("__subclasses__") + b"\x86R)R.",
    "a dotted name below torch": b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93.",
    "torch.load": b"\x80\x02ctorch.serialization\nload\n" + text("file") + b"\x85R.",
    "torch.hub": b"\x80\x02ctorch.hub\nload\n" + text("file") + text("x") + b"\x86R.",
    "a registered extension": b"\x80\x02\x82\x01.",
    "a change of a class": b"\x80\x02ctorch\nSize\nN}" + text("__init__") + b"ctorch\nfloat32\ns\x86b.",
    "a change of a dtype": b"\x80\x02ctorch\nfloat32\n}" + text("itemsize") + b"K\x01sb.",
    "a call of a text": b"\x80\x02" + text("x") + b")R.",
    "a persistent id that is text": b"\x80\x02Px\n.",
}
"""Runs nothing that leaves a trace, and has no place."""


LARGE: dict[str, bytes] = {
    "bytes of 2**62": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "text of 2**62": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
    "a number of 2**30 bytes": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"x.",
    "a buffer of a terabyte": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "a frame of a terabyte": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.",
    "a bytearray of a terabyte": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R.",
    "a memo of four billion": b"\x80\x02Kr\xff\xff\xff\xff.",
    "a billion laughs, hashed": laughs(60),
    "nested tuples, hashed": b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns.",
    "a set copied many times": b"\x80\x02](" + b"".join(b"M" + struct.pack("<H", n) for n in range(20_000)) + b"eq\x00]("
    + b"cbuiltins\nset\nh\x00\x85R" * 20_000 + b"e.",
    "a text encoded many times": b"\x80\x02" + text("x" * 200_000) + b"q\x00]("
    + b"c_codecs\nencode\nh\x00\x85R" * 50_000 + b"e.",
    "paths that double": b"\x80\x02cpathlib\nPosixPath\n" + text("x" * 100) + b"\x85Rq\x00"
    + b"0cpathlib\nPosixPath\nh\x00h\x00\x86Rq\x00" * 60 + b".",
}  # fmt: skip
"""By what they ask for."""


def archive(data: bytes, parts: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A `torch.save` file with any pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", b"little")
        for name, content in (parts or {}).items():
            file.writestr(f"archive/{name}", content)
        file.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def saved(value: Any) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little")


def tensor_pickle(count: int, size: int = 4, stride: int = 1, offset: int = 0) -> bytes:
    """A dictionary of one tensor of part 0, of which it claims `count` elements."""
    storage = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count)
    shape = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ" + shape + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + text("w") + tensor + b"s."
