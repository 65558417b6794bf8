"""FAISS files: read so that a damaged or hostile one is an error, and not the end of the process.

A flat file has a header and vectors, and is checked here. FAISS itself checks much of what it reads in other files; since
that is not a promise, they are read and searched in a process of their own first, in bounded memory and time. What FAISS
does not check (row numbers in the lists of an IVF index, sizes of parts that must fit each other) is checked after reading.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from searchr1.retrieval.index.manifest import DamagedIndex

FLAT = (b"IxFI", b"IxF2", b"IxFl")
FLAT_HEADER = struct.Struct("<4siqqqBi")
"""Kind, dimension, rows, two unused numbers, trained, metric; then (metrics beside the first two have) a number."""
MAX_DIMENSION = 1 << 20
LEAST_BYTES = 64 << 20
"""FAISS may allocate so much for any file, or twice the file's size."""
PROBE_BYTES = 4 << 30
"""Memory of the process that reads a file first, beside three times the file's size."""
PROBE_S, PROBE_BYTES_A_SECOND = 60.0, 20 << 20
"""Its time: so many seconds, and what reading takes at such a speed."""
MAX_EF_SEARCH = 1 << 20


def flat_shape(path: Path) -> tuple[int, int] | None:
    """Return (rows, dimension) of a flat file whose size is what its header says; None for another kind.

    Raises:
        DamagedIndex: it cannot be read, or has another size.
    """
    try:
        with path.open("rb") as file:
            start = file.read(FLAT_HEADER.size + 12)
        size = path.stat().st_size
    except OSError as error:
        raise DamagedIndex(path, f"cannot be read ({error.strerror})") from error
    if start[:4] not in FLAT:
        return None
    if len(start) < FLAT_HEADER.size + 8:
        raise DamagedIndex(path, f"has {size} bytes, less than the header of a FAISS index")
    _, dimension, rows, _, _, _, metric = FLAT_HEADER.unpack_from(start)
    place = FLAT_HEADER.size + (4 if metric > 1 else 0)
    numbers = int.from_bytes(start[place : place + 8], "little")
    if not 0 < dimension <= MAX_DIMENSION or rows < 0 or numbers != rows * dimension:
        raise DamagedIndex(path, f"is damaged: its header says {rows} vectors x {dimension}, and {numbers} numbers")
    if size != (wanted := place + 8 + 4 * numbers):
        raise DamagedIndex(path, f"has {size} bytes instead of {wanted}")
    return rows, dimension


def read_faiss(path: Path, mapped: bool = True) -> Any:
    """Return the index in a file, whose structure holds.

    Raises:
        DamagedIndex: it is damaged, or no index.
    """
    import faiss

    flat_shape(path)
    try:
        with read_limits(path.stat().st_size):
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except (RuntimeError, MemoryError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DamagedIndex(path, f"is not readable as a FAISS index ({reason[-1]})") from error
    if problem := next(problems(index, path.parent), None):
        raise DamagedIndex(path, f"is damaged: {problem}")
    return index


@contextmanager
def read_limits(size: int) -> Iterator[None]:
    """Limit what FAISS allocates for one array of a file of `size` bytes, and how often it repeats what the file says."""
    import faiss

    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(max(2 * size, LEAST_BYTES))
    faiss.set_deserialization_loop_limit(max(size, 1))
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before[0])
        faiss.set_deserialization_loop_limit(before[1])


def problems(index: Any, folder: Path) -> Iterator[str]:
    """Yield what keeps an index from being searched safely."""
    import faiss

    index = faiss.downcast_index(index)
    if index is None:
        yield "a part is missing"
        return
    rows = int(index.ntotal)
    inner: list[tuple[Any, int, int | None]] = []
    if not index.is_trained:
        yield "it is not trained"
    if isinstance(index, faiss.IndexPreTransform):
        inner = [(index.index, rows, None)]
    elif isinstance(index, faiss.IndexIDMap):
        inner = [(index.index, rows, index.d)]
        ids = faiss.vector_to_array(index.id_map)
        if ids.size and not 0 <= ids.min() <= ids.max() < rows:
            yield f"its row numbers go from {ids.min()} to {ids.max()}, for {rows} rows"
    elif isinstance(index, faiss.IndexRefine):
        inner = [(index.base_index, rows, index.d), (index.refine_index, rows, index.d)]
    elif isinstance(index, faiss.IndexHNSW):
        inner = [(index.storage, rows, index.d)]
        if index.hnsw.levels.size() != rows:
            yield f"its graph has {index.hnsw.levels.size()} nodes for {rows} rows"
        if not 0 < index.hnsw.efSearch <= MAX_EF_SEARCH:
            yield f"its efSearch is {index.hnsw.efSearch}"
    elif isinstance(index, faiss.IndexIVF):
        inner = [(index.quantizer, index.nlist, index.d)]
        if not index.nprobe > 0:
            yield "its nprobe is 0"
        yield from list_problems(index, folder)
    elif isinstance(index, faiss.IndexFlatCodes) and index.codes.size() != rows * index.code_size:
        yield f"it has {index.codes.size()} bytes of codes instead of {rows * index.code_size}"
    for part, wanted, dimension in inner:
        if part is None:
            yield "a part is missing"
        elif part.ntotal != wanted or dimension not in (None, part.d):
            yield f"a part of it has {part.ntotal} vectors x {part.d} instead of {wanted} x {dimension or part.d}"
        else:
            yield from problems(part, folder)


def list_problems(index: Any, folder: Path) -> Iterator[str]:
    """Yield what is wrong with the lists of an IVF index: FAISS gives the row numbers in them as they are."""
    import faiss

    lists = faiss.downcast_InvertedLists(index.invlists) if index.invlists is not None else None
    if lists is None:
        yield "its lists are not in the file"
        return
    if isinstance(lists, faiss.OnDiskInvertedLists) and Path(lists.filename).absolute().parent != folder.absolute():
        yield f"its lists are in {lists.filename}, outside of its folder"
        return
    rows, listed = int(index.ntotal), 0
    for number in range(index.nlist):
        size = int(lists.list_size(number))
        listed += size
        if not size:
            continue
        ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
        least, most = int(ids.min()), int(ids.max())
        if not 0 <= least <= most < rows:
            yield f"list {number} has the rows {least} to {most}, of {rows}"
            return
    if listed != rows:
        yield f"its lists have {listed} rows instead of {rows}"


def probe(path: Path) -> None:
    """Read a file that is not flat, and search in it, in a process of its own.

    Raises:
        DamagedIndex: that went wrong, in whatever way.
    """
    if flat_shape(path) is not None:
        return
    seconds = PROBE_S + path.stat().st_size / PROBE_BYTES_A_SECOND
    # -P: modules come from where ours do, and not from the working directory, which may be a downloaded folder.
    command = [sys.executable, "-P", "-m", "searchr1.retrieval.index.faiss_probe", str(path.absolute())]
    roots = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    # One thread: each takes address space, which is limited.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(roots)}
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DamagedIndex(path, f"is damaged: FAISS did not finish reading and searching it in {seconds:.0f} s") from error
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        raise DamagedIndex(path, f"is damaged: a process that read and searched it died of {name}")
    try:
        problem = json.loads(ended.stdout.decode().splitlines()[-1])["problem"]
    except (ValueError, IndexError, KeyError) as error:
        last = ended.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
        raise DamagedIndex(path, f"could not be read in a process of its own ({last[0]})") from error
    if problem:
        raise DamagedIndex(path, problem)
