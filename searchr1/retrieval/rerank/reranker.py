"""A second stage: a cross-encoder reads query and passage together and puts the candidates in a better order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from searchr1.checkpoints.model_folder import check_files
from searchr1.errors import UserError
from searchr1.files.text_rows import whole_text
from searchr1.retrieval.documents import split_contents
from searchr1.retrieval.encode.encoder import BATCH_TOKENS, batches, check_device
from searchr1.retrieval.searcher import BatchObserver, Document, Searcher, SearchFailed, SearchResults

Pair = tuple[str, str]
"""(query, passage)"""
Scores = npt.NDArray[np.float32]

PAIR_TOKENS = 512
"""Most tokens of a pair."""
CPU_BATCH_TOKENS = 1024
"""Tokens of one forward pass on a processor: 16384 of them leave its caches and take 1.6 times as long."""
CHARACTERS_PER_TOKEN = 16
"""Of a text, only so many characters for each token of the model are read: web pages are long, tokenizers slow."""
MAX_PAIRS = 256
"""Pairs that are scored together; what is more waits for the next turn, and a cancelled request is dropped by then."""
MAX_PENDING = 1 << 16
"""Pairs in the queue before requests are rejected: minutes of work for a GPU."""
RETRY_AFTER_S = 1.0


def passage_text(document: Document) -> str:
    """Return what a cross-encoder reads of a passage: the title without its quotes, a line break, the text."""
    title, text = split_contents(str(document.get("contents", "")))
    return f"{title}\n{text}" if title else text


class CrossEncoder:
    """A Hugging Face model that scores pairs. Not for several threads at once.

    A score is the model's logit, or with two classes the second logit less the first: the order is that of the
    probabilities, without the rounding near 0 and 1.
    """

    def __init__(
        self,
        path: str,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        max_length: int = PAIR_TOKENS,
        token_budget: int | None = None,
    ) -> None:
        """Load a sequence-classification model with one score, or with two classes of which the second is "relevant".

        `max_length`: tokens of a pair; less if the model takes less. `token_budget`: tokens of one forward pass,
        padding included; None takes what suits the device.

        Raises:
            UserError: no such model or device, or the model cannot score a pair.
        """
        import torch
        import transformers
        from safetensors import SafetensorError

        torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[check_device(device, dtype)]
        kind: Any = transformers.AutoModelForSequenceClassification
        try:
            check_files(path)
        except UserError as error:
            raise UserError(f"--reranker_model {error}") from error
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model, loaded = kind.from_pretrained(path, dtype=torch_dtype, output_loading_info=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
            raise UserError(f"--reranker_model {path}: cannot load a cross-encoder: {error}") from error
        if loaded["missing_keys"]:
            missing = next(iter(loaded["missing_keys"]))
            raise UserError(f"--reranker_model {path}: is not a cross-encoder: it has no {missing}")
        if model.config.num_labels not in (1, 2):
            raise UserError(f"--reranker_model {path}: has {model.config.num_labels} classes; 1 or 2 are understood")
        limit = getattr(model.config, "max_position_embeddings", None) or max_length
        self.max_length = min(max_length, self._tokenizer.model_max_length, limit)
        self._token_budget = token_budget or (CPU_BATCH_TOKENS if torch.device(device).type == "cpu" else BATCH_TOKENS)
        self._device = device
        try:
            self._model = model.to(device).eval()
            self.score([("short", "pair"), ("long " * self.max_length,) * 2])
        except Exception as error:  # whatever it is, every request would meet it
            raise UserError(f"--reranker_model {path}: cannot score a pair of {self.max_length} tokens: {error}") from error

    def score(self, pairs: Sequence[Pair]) -> Scores:
        """Return [pairs] scores, higher is better; pairs are sorted by length inside, so that little is padded.

        Raises:
            ValueError: a score is not a number.
        """
        scores = np.empty(len(pairs), dtype=np.float32)
        if not pairs:
            return scores
        queries, texts = ([self._readable(text) for text in side] for side in zip(*pairs, strict=True))
        ids = self._tokenizer(queries, texts, truncation=True, max_length=self.max_length)
        for rows in batches([len(row) for row in ids["input_ids"]], self._token_budget):
            inputs = self._tokenizer.pad({key: [ids[key][row] for row in rows] for key in ids}, return_tensors="pt")
            scores[rows] = self._forward(inputs.to(self._device))
        if not np.isfinite(scores).all():
            raise ValueError("a score is not a number; if the model runs in fp16, use --dtype bf16 or fp32")
        return scores

    def _readable(self, text: str) -> str:
        """Return the part that is read, without halves of surrogate pairs, which tokenizers reject."""
        return whole_text(text[: self.max_length * CHARACTERS_PER_TOKEN])

    def _forward(self, inputs: Any) -> Scores:
        import torch

        with torch.inference_mode():
            logits = self._model(**inputs).logits.float()
            scores: Scores = (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).cpu().numpy()
            return scores


class Reranker(Protocol):
    """Puts the passages of each query in a better order."""

    async def rerank(self, queries: Sequence[str], documents: Sequence[Sequence[Document]], topk: int) -> SearchResults:
        """Return the best `topk` of each query's documents with their scores; of equal ones the earlier first.

        Raises:
            SearchFailed: no answer now.
        """
        ...

    async def aclose(self) -> None:
        """Give back threads and connections."""
        ...


@dataclass(slots=True)
class _Waiting:
    """A request, or a part of a large one."""

    pairs: list[Pair]
    scores: asyncio.Future[Scores] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class LocalReranker:
    """A cross-encoder in this process. Pairs that come in while it is busy are scored together.

    The model runs in one thread of its own. Large requests are scored in parts; cancelled ones are not scored.
    """

    def __init__(self, model: CrossEncoder, max_pending: int = MAX_PENDING, observe: BatchObserver | None = None) -> None:
        """Start a thread for the model; `max_pending`: most pairs in the queue."""
        self._model = model
        self._max_pending = max_pending
        self._observe = observe
        self._waiting: list[_Waiting] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rerank")
        self._running: asyncio.Task[None] | None = None

    async def rerank(self, queries: Sequence[str], documents: Sequence[Sequence[Document]], topk: int) -> SearchResults:
        """Return the best `topk` of each query's documents, see `Reranker`."""
        pairs = [(query, passage_text(d)) for query, row in zip(queries, documents, strict=True) for d in row]
        scores = await self._score(pairs)
        first = np.cumsum([0, *map(len, documents)])
        return [
            best(row, scores[start:stop], topk) for row, start, stop in zip(documents, first[:-1], first[1:], strict=True)
        ]

    async def aclose(self) -> None:
        """Wait for the batch that runs, fail what waits."""
        for request in self._waiting:
            if not request.scores.done():
                request.scores.set_exception(SearchFailed("the server is stopping"))
        self._waiting = []
        await asyncio.to_thread(self._thread.shutdown)

    async def _score(self, pairs: list[Pair]) -> Scores:
        pending = sum(len(request.pairs) for request in self._waiting if not request.scores.done())
        # A request larger than the queue is taken by an idle server: it could never be answered otherwise.
        if pending and pending + len(pairs) > self._max_pending:
            raise SearchFailed(f"{pending} pairs are waiting to be reranked", RETRY_AFTER_S)
        parts = [_Waiting(pairs[start : start + MAX_PAIRS]) for start in range(0, len(pairs), MAX_PAIRS)]
        self._waiting += parts
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        # When the request is cancelled, or a part fails, the other parts are given up too.
        scores = asyncio.gather(*(part.scores for part in parts))
        try:
            return np.concatenate([np.empty(0, dtype=np.float32), *await scores])
        finally:
            for part in parts:
                part.scores.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._take():
            pairs = [pair for request in batch for pair in request.pairs]
            started = time.perf_counter()
            try:
                scores = await loop.run_in_executor(self._thread, self._model.score, pairs)
            except Exception as error:
                for request in batch:
                    if not request.scores.done():
                        request.scores.set_exception(SearchFailed(f"the reranker failed: {error}"))
                continue
            if self._observe:
                self._observe(len(pairs), time.perf_counter() - started)
            start = 0
            for request in batch:
                if not request.scores.done():
                    request.scores.set_result(scores[start : start + len(request.pairs)])
                start += len(request.pairs)

    def _take(self) -> list[_Waiting]:
        """Take the oldest requests, up to `MAX_PAIRS`; cancelled ones are dropped."""
        waiting = [request for request in self._waiting if not request.scores.done()]
        taken = pairs = 0
        while taken < len(waiting) and pairs + len(waiting[taken].pairs) <= MAX_PAIRS:
            pairs += len(waiting[taken].pairs)
            taken += 1
        self._waiting = waiting[taken:]
        return waiting[:taken]


def best(documents: Sequence[Document], scores: Scores, topk: int) -> list[tuple[Document, float]]:
    """Return the `topk` best documents; of equal ones the earlier first."""
    order = np.argsort(-scores, kind="stable")[:topk]
    return [(documents[place], float(scores[place])) for place in order]


class RerankingSearcher:
    """Candidates from one searcher, the best of them by a reranker."""

    def __init__(self, inner: Searcher, reranker: Reranker, topk_retrieval: int) -> None:
        self._inner = inner
        self._reranker = reranker
        self._topk_retrieval = topk_retrieval

    async def search(self, queries: Sequence[str], topk: int) -> SearchResults:
        """Return the best `topk` of the server's number of candidates."""
        return await self.search_reranked(queries, max(self._topk_retrieval, topk), topk)

    async def search_reranked(self, queries: Sequence[str], topk_retrieval: int, topk_rerank: int) -> SearchResults:
        """Return the best `topk_rerank` of `topk_retrieval` candidates."""
        results = await self._inner.search(queries, topk_retrieval)
        return await self._reranker.rerank(queries, [[document for document, _ in hits] for hits in results], topk_rerank)

    async def aclose(self) -> None:
        """Close both stages."""
        try:
            await self._inner.aclose()
        finally:
            await self._reranker.aclose()
