"""`--faiss_type`: names for the indexes that most people want, or any FAISS factory string."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

NAMES = ("Flat", "SQ8", "IVF", "IVFPQ", "HNSW")
POINTS_PER_LIST = 40
"""Vectors that one centroid is trained on; FAISS warns below 39."""
LOSSY = ("PQ", "SQ", "RaBitQ", "LSQ", "RQ", "PRQ", "PLSQ", "ITQ", "LSH", "ZnLattice", "PCA", "OPQ", "RR")
"""What the parts of a factory string begin with that round vectors, or may drop dimensions."""


@dataclass(frozen=True, slots=True)
class FaissType:
    """What to build, and how to search it."""

    factory: str
    """FAISS factory string."""
    lossy: bool
    """Vectors are rounded: candidates are scored again with the exact ones."""
    nprobe: int | None = None
    """Lists that are searched, for IVF."""
    ef_search: int | None = None
    """Size of the candidate list, for HNSW."""
    refine_factor: int = 1
    """Candidates per passage that is asked for."""


def faiss_type(name: str, rows: int, dimension: int) -> FaissType:
    """Return the index behind a name, for so many vectors.

    `IVFPQ` is the one for large corpora: two dimensions in four bits, about a fourteenth of Flat's memory. See
    docs/guides/retrieval.md for what each costs and finds.
    """
    lists = list_count(rows)
    if name == "IVF":
        return FaissType(f"IVF{lists},Flat", False, nprobe=probes(lists))
    if name == "IVFPQ":
        parts = dimension // 2 if dimension % 2 == 0 else dimension
        return FaissType(f"IVF{lists},PQ{parts}x4fs", True, nprobe=probes(lists), refine_factor=32)
    if name == "HNSW":
        return FaissType("HNSW32,Flat", False, ef_search=128)
    lossy = is_lossy(name)
    given = lists_of(name)
    return FaissType(
        name,
        lossy,
        nprobe=probes(given) if given else None,
        ef_search=128 if name.startswith("HNSW") else None,
        refine_factor=4 if lossy else 1,
    )


def is_lossy(factory: str) -> bool:
    """Return whether the index stores something else than the vectors."""
    return any(part.strip().startswith(LOSSY) for part in re.split("[,_]", factory))


def lists_of(factory: str) -> int | None:
    """Return the number of lists that a factory string asks for (`IVF4096`, `IVF64k`); None if it asks for none."""
    match = re.search(r"\bIVF(\d+)([kM]?)", factory)
    return int(match[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[match[2]] if match else None


def list_count(rows: int) -> int:
    """Return about 4 sqrt(rows), a power of two, as long as there are enough vectors to train on."""
    wanted: int = 2 ** round(math.log2(4 * math.sqrt(max(rows, 1))))
    return max(min(wanted, rows // POINTS_PER_LIST), 1)


def probes(lists: int) -> int:
    """Return a twenty-eighth of the lists, at least 8."""
    return min(max(lists // 28, 8), lists)
