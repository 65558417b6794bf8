"""The process that reads a FAISS file before the server does: `python -m searchr1.retrieval.index.faiss_probe FILE`.

It prints `{"problem": null}`, or what is wrong; or it dies, which says as much.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from searchr1.retrieval.index.faiss_files import PROBE_BYTES, read_faiss
from searchr1.retrieval.index.manifest import DamagedIndex

QUERIES, TOPK, PROBED_LISTS = 32, 10, 64


def limit_memory(more: int) -> None:
    """Take at most `more` bytes of address space beyond what is taken now; only Linux can limit that."""
    taken = Path("/proc/self/statm")
    if not taken.exists():
        return
    pages = int(taken.read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + more
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def problem_of(path: Path) -> str | None:
    """Return what is wrong with a file; None if it can be read and searched."""
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(1)
    limit_memory(PROBE_BYTES + 3 * path.stat().st_size)
    try:
        index = read_faiss(path)
        queries = np.random.default_rng(0).standard_normal((QUERIES, index.d)).astype(np.float32)
        if isinstance(index, faiss.IndexIVF):
            index.nprobe = min(index.nlist, PROBED_LISTS)
        scores, rows = index.search(queries, min(TOPK, index.ntotal))
    except DamagedIndex as error:
        return error.damage.problem
    except (RuntimeError, MemoryError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"is damaged: FAISS cannot search it ({reason[-1]})"
    if wrong := rows[(rows < -1) | (rows >= index.ntotal)].tolist():
        return f"is damaged: a search finds row {wrong[0]} of {index.ntotal}"
    if np.isnan(scores[rows >= 0]).any():
        return "is damaged: a search gives scores that are no numbers"
    return None


if __name__ == "__main__":
    print(json.dumps({"problem": problem_of(Path(sys.argv[1]))}))
