"""`--faiss_type`: names for the indexes that most people want, or any FAISS factory string."""

from __future__ import annotations

import math
from dataclasses import dataclass

NAMES = ("Flat", "SQ8", "IVF", "IVFPQ", "HNSW")
POINTS_PER_LIST = 40
"""Vectors that one centroid is trained on; FAISS warns below 39."""
LOSSY = ("PQ", "SQ4", "SQ6", "SQ8", "RaBitQ", "LSQ", "RQ", "PRQ", "PLSQ", "ITQ", "LSH", "ZnLattice")


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
    """For HNSW."""
    refine_factor: int = 1
    """Candidates per passage that is asked for."""


def faiss_type(name: str, rows: int, dimension: int) -> FaissType:
    """The index behind a name, for so many vectors.

    `IVFPQ` is the one for large corpora: two dimensions in four bits, about a fourteenth of Flat's memory. See
    docs/retrieval.rst for what each costs and finds.
    """
    lists = list_count(rows)
    if name == "IVF":
        return FaissType(f"IVF{lists},Flat", False, nprobe=probes(lists))
    if name == "IVFPQ":
        parts = dimension // 2 if dimension % 2 == 0 else dimension
        return FaissType(f"IVF{lists},PQ{parts}x4fs", True, nprobe=probes(lists), refine_factor=32)
    if name == "HNSW":
        return FaissType("HNSW32,Flat", False, ef_search=128)
    factory = name
    return FaissType(
        factory,
        is_lossy(factory),
        nprobe=probes(int(factory.partition("IVF")[2].split(",")[0].split("_")[0] or 1)) if "IVF" in factory else None,
        ef_search=128 if "HNSW" in factory else None,
        refine_factor=4 if is_lossy(factory) else 1,
    )


def is_lossy(factory: str) -> bool:
    """Whether the index stores something else than the vectors."""
    return any(part.strip().startswith(LOSSY) for part in factory.split(",")) or "SQfp16" in factory


def list_count(rows: int) -> int:
    """About 4 sqrt(rows), a power of two, as long as there are enough vectors to train on."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(max(rows, 1))))
    return max(min(wanted, rows // POINTS_PER_LIST), 1)


def probes(lists: int) -> int:
    """A twenty-eighth of the lists, at least 8."""
    return min(max(lists // 28, 8), lists)
