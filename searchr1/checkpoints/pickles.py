"""A reader of pickles from strangers: nothing that they name is run, and what they build stays as small as the file."""

from __future__ import annotations

import io
import os
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable
from typing import IO, Any, ClassVar

_MAX_DEPTH = 100
"""Of tuples in tuples."""
_REJECTED = (
    pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.BYTEARRAY8,
    pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
)  # fmt: skip
"""Instructions that no checkpoint needs."""


class Sealed(type):
    """The type of classes that a pickle may make instances of; it cannot change them."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"changes the class {cls.__name__}")


class StandIn(metaclass=Sealed):
    """For anything that is named and not needed: takes everything, keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        """Take anything."""
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Forget it."""


class Mapping(dict[Any, Any]):
    """For an OrderedDict, whose attributes (such as a state dict's `_metadata`) are forgotten."""

    def __setstate__(self, state: Any) -> None:
        """Forget it."""


class Call:
    """What a pickle may call instead of a function that it names."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


_Stop: type[Exception] = vars(pickle)["_Stop"]
_Unpickler: Any = pickle._Unpickler
"""In Python, so that single instructions can be replaced; what describes tensors is small."""


class Reader(_Unpickler):
    """Reads one pickle. `find` returns the object that stands for a name, or None where the name has no place."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_Unpickler.dispatch)

    def __init__(self, data: bytes | io.BytesIO, find: Callable[[str, str, Reader], Any]) -> None:
        source = data if isinstance(data, io.BytesIO) else io.BytesIO(data)
        super().__init__(source, encoding="bytes")
        self._source = source
        self._find = find
        self._left = source.getbuffer().nbytes
        self._tuples: dict[int, tuple[tuple[Any, ...], int, int]] = {}
        self.memo: dict[int, Any]
        self.stack: list[Any]

    def load(self) -> Any:
        """Return what the pickle describes; the source is left behind its end.

        Raises:
            Exception: it is damaged, which can raise anything, or asks for something that has no place.
        """
        self.read, self.readline = self._source.read, self._source.readline
        self.metastack: list[list[Any]] = []
        self.stack = []
        self.append = self.stack.append
        self.proto = 0
        read, dispatch = self.read, self.dispatch
        try:
            while key := read(1):
                dispatch[key[0]](self)
        except _Stop as stop:
            return stop.value  # type: ignore[attr-defined]
        raise EOFError("it ends early")

    def count(self, elements: int) -> None:
        """Take elements that are copied or hashed from what the size of the file allows.

        Raises:
            pickle.UnpicklingError: there is nothing left.
        """
        self._left -= elements
        if self._left < 0:
            raise pickle.UnpicklingError("copies more than it holds")

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that stands for a name.

        Raises:
            pickle.UnpicklingError: the name has no place.
        """
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        found = self._find(module, name, self)
        if found is None:
            raise pickle.UnpicklingError(
                f"names {module[:60]}.{name[:60]}, which has no place in a checkpoint and is not run"
            )
        return found

    def count_hashed(self, items: Iterable[Any]) -> None:
        """Count what hashing objects goes through.

        Raises:
            pickle.UnpicklingError: too much.
        """
        for item in items:
            if type(item) is tuple and item:
                self.count(self._tuples[id(item)][1])

    def persistent_load(self, pid: Any) -> Any:
        """Reject references to what is stored elsewhere; a format that has some overrides this."""
        raise pickle.UnpicklingError("refers to something outside of it")

    def _weigh(self) -> None:
        """Count how much the hash of the newest tuple would visit."""
        found = self.stack[-1]
        weight, depth = 1 + len(found), 1
        for item in found:
            if type(item) is tuple and item:
                _, more, below = self._tuples[id(item)]
                weight, depth = weight + more, max(depth, below + 1)
        if depth > _MAX_DEPTH:
            raise pickle.UnpicklingError("has tuples in tuples beyond measure")
        if found:
            self._tuples[id(found)] = (found, weight, depth)  # kept, so that no other gets its id

    def _load_tuple(self) -> None:
        _Unpickler.load_tuple(self)
        self._weigh()

    def _load_tuple1(self) -> None:
        _Unpickler.load_tuple1(self)
        self._weigh()

    def _load_tuple2(self) -> None:
        _Unpickler.load_tuple2(self)
        self._weigh()

    def _load_tuple3(self) -> None:
        _Unpickler.load_tuple3(self)
        self._weigh()

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        called = self.stack[-1]
        if type(arguments) is not tuple:
            raise pickle.UnpicklingError("calls something without arguments")
        self.stack[-1] = call(called, arguments)

    def _load_newobj(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack[-1]
        if type(kind) is not Sealed or type(arguments) is not tuple:
            raise pickle.UnpicklingError("makes an object of something that is not a class")
        new: Callable[..., Any] = kind.__new__
        self.stack[-1] = new(kind, *arguments)

    def _load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(type(target)) is not Sealed and type(target) is not Mapping:
            raise pickle.UnpicklingError(f"changes an object of the type {type(target).__name__}")
        target.__setstate__(state)

    def _load_append(self) -> None:
        if type(self.stack[-2]) is not list:
            raise pickle.UnpicklingError("appends to something that is not a list")
        _Unpickler.load_append(self)

    def _load_appends(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError("appends to something that is not a list")
        self.stack[-1].extend(items)

    def _load_setitem(self) -> None:
        if type(self.stack[-3]) not in (dict, Mapping):
            raise pickle.UnpicklingError("sets items of something that is not a dictionary")
        self.count_hashed(self.stack[-2:-1])
        _Unpickler.load_setitem(self)

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) not in (dict, Mapping):
            raise pickle.UnpicklingError("sets items of something that is not a dictionary")
        self.count_hashed(items[::2])
        for index in range(0, len(items), 2):
            target[items[index]] = items[index + 1]

    def _load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise pickle.UnpicklingError("adds to something that is not a set")
        self.count_hashed(items)
        self.stack[-1].update(items)

    def _load_frozenset(self) -> None:
        items = self.pop_mark()
        self.count_hashed(items)
        self.append(frozenset(items))

    def _load_frame(self) -> None:
        self.read(8)  # its length, which helps whoever reads from a slow file

    def _reject(self) -> None:
        raise pickle.UnpicklingError("has an instruction that has no place in a checkpoint")

    dispatch[pickle.TUPLE[0]] = _load_tuple
    dispatch[pickle.TUPLE1[0]] = _load_tuple1
    dispatch[pickle.TUPLE2[0]] = _load_tuple2
    dispatch[pickle.TUPLE3[0]] = _load_tuple3
    dispatch[pickle.REDUCE[0]] = _load_reduce
    dispatch[pickle.NEWOBJ[0]] = _load_newobj
    dispatch[pickle.BUILD[0]] = _load_build
    dispatch[pickle.APPEND[0]] = _load_append
    dispatch[pickle.APPENDS[0]] = _load_appends
    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.SETITEMS[0]] = _load_setitems
    dispatch[pickle.ADDITEMS[0]] = _load_additems
    dispatch[pickle.FRAME[0]] = _load_frame
    dispatch[pickle.FROZENSET[0]] = _load_frozenset
    dispatch |= dict.fromkeys([code[0] for code in _REJECTED], _reject)


def call(called: Any, arguments: tuple[Any, ...]) -> Any:
    """Return what a permitted object makes of its arguments.

    Raises:
        pickle.UnpicklingError: it is not permitted.
    """
    if type(called) is Call:
        return called.function(*arguments)
    if called is StandIn:
        return StandIn()
    raise pickle.UnpicklingError("calls something that may not be called")


def container(kind: type[Any], reader: Reader) -> Call:
    """Return the call that makes a container, whose elements are counted."""

    def make(items: Any = ()) -> Any:
        if type(items) not in (list, tuple, set, dict, Mapping):
            raise pickle.UnpicklingError(f"makes a {kind.__name__} of something else than elements")
        reader.count(len(items))
        keys = (item[0] if kind is Mapping and type(item) in (list, tuple) and item else item for item in items)
        reader.count_hashed(keys)
        return kind(items)

    return Call(make)


class FilePart(io.RawIOBase):
    """Part of a file as a file of its own. (PyTorch's own view cannot seek from its end, which zipfile does.)"""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._number, self._start, self._length = file.fileno(), start, length
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to where the next read starts."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def tell(self) -> int:
        """Return where the next read starts."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as one read of the file does."""
        view = memoryview(buffer)[: max(self._length - self._position, 0)]
        count = os.preadv(self._number, [view], self._start + self._position)
        self._position += count
        return count
