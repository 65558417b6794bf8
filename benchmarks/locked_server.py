"""The baseline of retrieval_load.py: a server that handles one request at a time behind a lock.

    python benchmarks/locked_server.py KIND CORPUS INDEX MODEL PORT      KIND: dense or bm25

This is how the servers that users come from work: a synchronous handler, one global lock, one query encoded and searched at
a time. It uses the same index, the same encoder and the same cores as ours.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from searchr1.retrieval.index.corpus import Corpus


class Query(BaseModel):
    """The request."""

    queries: list[str]
    topk: int = 3
    return_scores: bool = False


def searcher(kind: str, index: Path, model: str) -> Any:
    """(query, topk) -> rows and scores, one query at a time."""
    if kind == "bm25":
        import bm25s

        retriever = bm25s.BM25.load(str(index), mmap=True)

        def search_bm25(query: str, topk: int) -> Any:
            tokens = bm25s.tokenize([query], stopwords=None, show_progress=False)
            rows, scores = retriever.retrieve(tokens, k=topk, show_progress=False)
            return rows[0], scores[0]

        return search_bm25

    import faiss
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    vectors = faiss.read_index(str(index))

    def search_dense(query: str, topk: int) -> Any:
        inputs = tokenizer([f"query: {query}"], padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            states = encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].float()
        vector = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        scores, rows = vectors.search(vector.numpy(), topk)
        return rows[0], scores[0]

    return search_dense


def main() -> None:
    """Serve until stopped."""
    kind, corpus_path, index_path, model, port = sys.argv[1:]
    corpus = Corpus(Path(corpus_path))
    search = searcher(kind, Path(index_path), model)
    lock = threading.Lock()
    app = FastAPI()

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/retrieve")
    def retrieve(request: Query) -> dict[str, Any]:
        result = []
        with lock:
            for query in request.queries:
                rows, scores = search(query, request.topk)
                hits = [(corpus[int(row)], float(score)) for row, score in zip(rows, scores, strict=True)]
                result.append(
                    [{"document": d, "score": s} for d, s in hits] if request.return_scores else [d for d, _ in hits]
                )
        return {"result": result}

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
