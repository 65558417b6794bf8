"""What a server checks before it uses an index: nothing has changed, and compiled code can follow the files.

Sizes of all files and checksums of the small ones are compared with the manifest; the large ones' are left to
`searchr1 verify`. The structure is always checked, whole: see `bm25_files` and `faiss_files`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchr1.files.checksums import FileSum, damaged
from searchr1.files.lfs import is_pointer
from searchr1.progress import ProgressBar
from searchr1.retrieval.index.bm25_index import PARAMETERS_FILE, check_lists, open_lists
from searchr1.retrieval.index.faiss_files import flat_shape, probe
from searchr1.retrieval.index.manifest import DamagedIndex, Manifest, index_error

START_BYTES = 256 << 20
"""Files whose checksums are compared at every start, the smallest first: well below a second."""
BAR_BYTES = 1 << 30
"""Files of fewer bytes are checked without a progress bar."""

VECTOR_DTYPES = {".f16": np.float16, ".f32": np.float32}
"""Number formats of a file of vectors, by the ending of its name."""
IndexState = tuple[tuple[str, int, int, int], ...]
"""Path, size, inode and time of change of each file: the same files have the same contents."""


def state_of(paths: Iterable[Path]) -> IndexState:
    """Return the state of files; those that are missing are left out."""
    states = [(path, path.stat()) for path in sorted(paths) if path.exists()]
    return tuple((str(path), status.st_size, status.st_ino, status.st_ctime_ns) for path, status in states)


def faiss_file(path: Path, manifest: Manifest | None, retriever_name: str) -> Path:
    """Return the FAISS file of --index_path, which names it or its folder."""
    if not path.is_dir():
        return path
    return path / (manifest.file if manifest and manifest.file else f"{retriever_name}_Flat.index")


def files_of(path: Path, manifest: Manifest | None, retriever_name: str) -> list[Path]:
    """Return the files of the index that --index_path names."""
    folder = path if path.is_dir() else path.parent
    named = [folder / name for name in manifest.names()] if manifest else []
    served = [] if retriever_name == "bm25" else [faiss_file(path, manifest, retriever_name)]
    return [*named, *(file for file in served if file not in named)]


def check_index(path: Path, manifest: Manifest | None, retriever_name: str) -> IndexState:
    """Check the files of an index, print a line on what was checked, and return the state that they had.

    Raises:
        UserError: one is damaged.
    """
    folder = path if path.is_dir() else path.parent
    files = files_of(path, manifest, retriever_name)
    state = state_of(files)
    try:
        for file in files:
            reject_pointer(file)
        if manifest is not None:
            print(check_sums(folder, manifest), flush=True)
        if retriever_name == "bm25":
            size = sum(file.stat().st_size for file in files if file.is_file())
            with ProgressBar(f"checking {folder.name}", size, least=BAR_BYTES) as bar:
                check_bm25(folder, manifest, bar.advance)
        else:
            check_faiss(folder, manifest, faiss_file(path, manifest, retriever_name))
    except DamagedIndex as error:
        raise index_error(error) from error
    return state


def check_sums(folder: Path, manifest: Manifest) -> str:
    """Compare the files with the manifest as far as that takes no time; returns what was done.

    Raises:
        DamagedIndex: one is missing or has changed.
    """
    if manifest.files is None:
        return f"{folder}: was built before checksums were kept; only the structure of its files is checked"
    # A server does not read the embedding, so it may have been moved away.
    small, large = split({name: known for name, known in manifest.files.items() if name != manifest.embedding})
    for damage in damaged(folder, {name: FileSum(known.bytes, "") for name, known in large.items()} | small):
        raise DamagedIndex(damage.path, damage.problem)
    if not large:
        return f"{folder}: the checksums of its {len(small)} files hold"
    names = ", ".join(f"{name} ({known.bytes / 2**30:.1f} GiB)" for name, known in sorted(large.items()))
    return f"{folder}: sizes hold, and checksums but those of {names}: searchr1 verify {folder} compares them"


def split(files: Mapping[str, FileSum]) -> tuple[dict[str, FileSum], dict[str, FileSum]]:
    """Divide files into those whose checksums a start compares, and the others."""
    small: dict[str, FileSum] = {}
    large: dict[str, FileSum] = {}
    total = 0
    for name, known in sorted(files.items(), key=lambda item: item[1].bytes):
        total += known.bytes
        (small if total <= START_BYTES else large)[name] = known
    return small, large


def check_bm25(folder: Path, manifest: Manifest | None, advance: Callable[[int], object] = lambda _: None) -> None:
    """Read all posting lists; `advance` is called with the bytes that were read.

    Raises:
        DamagedIndex: a search would go astray in them.
    """
    lists = open_lists(folder)
    if manifest is not None and lists.rows != manifest.rows:
        raise DamagedIndex(folder / PARAMETERS_FILE, f"has {lists.rows} passages, its manifest says {manifest.rows}")
    check_lists(folder, lists, advance)


def check_faiss(folder: Path, manifest: Manifest | None, file: Path) -> None:
    """Check the form of a FAISS file, and that of the exact vectors beside it.

    Raises:
        DamagedIndex: it would end the process, or is not what the manifest says.
    """
    if not file.is_file():
        return  # reported by whoever opens it
    if manifest is not None and manifest.vectors:
        check_vectors(folder / manifest.vectors, manifest.rows, manifest.dimension or 0)
    shape = flat_shape(file)
    if shape is None:
        if file.stat().st_size > BAR_BYTES:
            print(f"{file}: is read in a process of its own first, which a damaged FAISS file could end", flush=True)
        probe(file)
    elif manifest is not None and file.name == manifest.file and shape != (manifest.rows, manifest.dimension):
        wanted = f"{manifest.rows} x {manifest.dimension}"
        raise DamagedIndex(file, f"has {shape[0]} vectors x {shape[1]}, its manifest says {wanted}")


def reject_pointer(path: Path) -> None:
    """Reject a file of Git LFS that stands for the real one.

    Raises:
        DamagedIndex: it is such a file.
    """
    if is_pointer(path):
        raise DamagedIndex(path, "is a Git LFS pointer, not the file: run git lfs pull in its folder")


def check_vectors(path: Path, rows: int, dimension: int) -> None:
    """Check the size of a file of vectors.

    Raises:
        DamagedIndex: it is another, or the name says no number format.
    """
    if path.suffix not in VECTOR_DTYPES:
        raise DamagedIndex(path, f"is not a file of vectors ({' or '.join(VECTOR_DTYPES)})")
    size = path.stat().st_size if path.is_file() else 0
    if size != (wanted := rows * dimension * np.dtype(VECTOR_DTYPES[path.suffix]).itemsize):
        raise DamagedIndex(path, f"has {size} bytes instead of {wanted}")


def open_vectors(path: Path, rows: int, dimension: int) -> npt.NDArray[Any]:
    """Map [rows, dimension] vectors.

    Raises:
        UserError: missing, or of another size.
    """
    try:
        check_vectors(path, rows, dimension)
    except DamagedIndex as error:
        raise index_error(error) from error
    return np.memmap(path, dtype=VECTOR_DTYPES[path.suffix], mode="r", shape=(rows, dimension))
