"""A second stage: a cross-encoder reads query and passage together and puts the candidates in a better order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from searchr1.errors import UserError
from searchr1.retrieval.documents import split_contents
from searchr1.retrieval.searcher import Document, Found, Searcher, SearchFailed

Pair = tuple[str, str]
"""(query, passage)"""

BATCH_TOKENS = 16_384
"""Tokens of one forward pass, padding included."""
MAX_PAIRS = 2048
"""Pairs that are scored together; what is more waits for the next turn."""


def passage_text(document: Document) -> str:
    """What a cross-encoder reads of a passage: the title without its quotes, a line break, the text."""
    title, text = split_contents(str(document.get("contents", "")))
    return f"{title}\n{text}" if title else text


class CrossEncoder:
    """A Hugging Face model that scores pairs. Not for several threads at once."""

    def __init__(self, path: str, *, max_length: int = 512, device: str = "cpu", dtype: str | None = None) -> None:
        """Load a sequence-classification model with one score, or with two classes of which the second is "relevant".

        Raises:
            UserError: no such folder, no such model, or no such device.
        """
        import torch
        import transformers

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--reranker_model {path}: this machine has no GPU that PyTorch can use")
        torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            dtype or ("fp16" if device.startswith("cuda") else "fp32")
        ]
        kind: Any = transformers.AutoModelForSequenceClassification
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
            model, loaded = kind.from_pretrained(path, dtype=torch_dtype, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise UserError(f"--reranker_model {path}: cannot load a cross-encoder: {error}") from error
        if loaded["missing_keys"]:
            raise UserError(f"--reranker_model {path}: is no cross-encoder: it has no {next(iter(loaded['missing_keys']))}")
        if model.config.num_labels not in (1, 2):
            raise UserError(f"--reranker_model {path}: has {model.config.num_labels} classes; 1 or 2 are understood")
        self._model = model.to(device).eval()
        self._device = device
        self._max_length = max_length

    def score(self, pairs: Sequence[Pair]) -> npt.NDArray[np.float32]:
        """[pairs] scores, higher is better; sorted by length inside, so that little is padded."""
        scores = np.empty(len(pairs), dtype=np.float32)
        if not pairs:
            return scores
        ids = self._tokenizer(
            [query for query, _ in pairs], [text for _, text in pairs], truncation=True, max_length=self._max_length
        )
        lengths = [len(row) for row in ids["input_ids"]]
        batch: list[int] = []
        for pair in sorted(range(len(pairs)), key=lengths.__getitem__):
            if batch and (len(batch) + 1) * lengths[pair] > BATCH_TOKENS:
                scores[batch] = self._forward(ids, batch)
                batch = []
            batch.append(pair)
        scores[batch] = self._forward(ids, batch)
        return scores

    def _forward(self, ids: Any, batch: list[int]) -> npt.NDArray[np.float32]:
        import torch

        inputs = self._tokenizer.pad({key: [ids[key][pair] for pair in batch] for key in ids}, return_tensors="pt")
        with torch.inference_mode():
            logits = self._model(**inputs.to(self._device)).logits.float()
        found: npt.NDArray[np.float32] = (
            (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).cpu().numpy()
        )
        return found


class Reranker(Protocol):
    """Puts the passages of each query in a better order."""

    async def rerank(self, queries: Sequence[str], documents: Sequence[Sequence[Document]], topk: int) -> Found:
        """The best `topk` of each query's documents with their scores; of equal ones the earlier first.

        Raises:
            SearchFailed: no answer now.
        """
        ...

    async def aclose(self) -> None:
        """Give back threads and connections."""
        ...


@dataclass(slots=True)
class _Waiting:
    pairs: list[Pair]
    scores: asyncio.Future[npt.NDArray[np.float32]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class LocalReranker:
    """A cross-encoder in this process. Pairs that come in while it is busy are scored together."""

    def __init__(self, model: CrossEncoder) -> None:
        self._model = model
        self._waiting: list[_Waiting] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rerank")
        self._running: asyncio.Task[None] | None = None

    async def rerank(self, queries: Sequence[str], documents: Sequence[Sequence[Document]], topk: int) -> Found:
        """See `Reranker`."""
        pairs = [(query, passage_text(d)) for query, row in zip(queries, documents, strict=True) for d in row]
        request = _Waiting(pairs)
        self._waiting.append(request)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        scores = await request.scores
        first = np.cumsum([0, *map(len, documents)])
        return [
            best(row, scores[start:stop], topk) for row, start, stop in zip(documents, first[:-1], first[1:], strict=True)
        ]

    async def aclose(self) -> None:
        """Wait for the batch that runs, drop what waits."""
        for request in self._waiting:
            request.scores.cancel()
        self._waiting = []
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._take():
            pairs = [pair for request in batch for pair in request.pairs]
            try:
                scores = await loop.run_in_executor(self._thread, self._model.score, pairs)
            except Exception as error:
                for request in batch:
                    if not request.scores.done():
                        request.scores.set_exception(SearchFailed(f"the reranker failed: {error}"))
                continue
            start = 0
            for request in batch:
                if not request.scores.done():
                    request.scores.set_result(scores[start : start + len(request.pairs)])
                start += len(request.pairs)

    def _take(self) -> list[_Waiting]:
        """The oldest requests, up to `MAX_PAIRS`; those given up are dropped."""
        waiting = [request for request in self._waiting if not request.scores.done()]
        batch: list[_Waiting] = []
        while waiting and (not batch or sum(len(r.pairs) for r in batch) + len(waiting[0].pairs) <= MAX_PAIRS):
            batch.append(waiting.pop(0))
        self._waiting = waiting
        return batch


def best(documents: Sequence[Document], scores: npt.NDArray[np.float32], topk: int) -> list[tuple[Document, float]]:
    """The `topk` best documents; of equal ones the earlier first."""
    order = np.argsort(-scores, kind="stable")[:topk]
    return [(documents[place], float(scores[place])) for place in order]


class RerankingSearcher:
    """Candidates from one searcher, the best of them by a reranker."""

    def __init__(self, inner: Searcher, reranker: Reranker, topk_retrieval: int) -> None:
        self._inner = inner
        self._reranker = reranker
        self._topk_retrieval = topk_retrieval

    async def search(self, queries: Sequence[str], topk: int) -> Found:
        """The best `topk` of the server's number of candidates."""
        return await self.search_reranked(queries, max(self._topk_retrieval, topk), topk)

    async def search_reranked(self, queries: Sequence[str], topk_retrieval: int, topk_rerank: int) -> Found:
        """The best `topk_rerank` of `topk_retrieval` candidates."""
        found = await self._inner.search(queries, topk_retrieval)
        return await self._reranker.rerank(queries, [[document for document, _ in hits] for hits in found], topk_rerank)

    async def aclose(self) -> None:
        """Close both stages."""
        await self._inner.aclose()
        await self._reranker.aclose()
