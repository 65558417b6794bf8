"""Text -> vectors with a Hugging Face encoder, with the prefixes and the pooling that its family was trained with."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from searchr1.errors import UserError

Role = Literal["query", "passage"]
Pooling = Literal["mean", "cls", "pooler", "decoder", "own"]
Vectors = npt.NDArray[np.float32]

BATCH_TOKENS = 16_384
"""Tokens of one forward pass, padding included."""


@dataclass(frozen=True, slots=True)
class Family:
    """How a family of encoders is used."""

    query_prefix: str
    passage_prefix: str
    pooling: Pooling
    normalise: bool


FAMILIES = {
    "e5": Family("query: ", "passage: ", "mean", True),
    "bge": Family("Represent this sentence for searching relevant passages: ", "", "cls", True),
    "dpr": Family("", "", "pooler", False),
    # As Search-R1 uses T5: the decoder's state at its first step.
    "t5": Family("", "", "decoder", False),
    # A folder of the sentence-transformers library says itself how it is used.
    "sentence-transformers": Family("", "", "own", False),
}


class Encoder:
    """An encoder on a processor (fp32, bf16) or a GPU (fp16 unless told otherwise). Not for several threads at once."""

    def __init__(
        self,
        name: str,
        path: str,
        *,
        max_length: int = 256,
        device: str = "cpu",
        dtype: str | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        """Load an encoder of a family of `FAMILIES`.

        Raises:
            UserError: unknown family or pooling, no such device, or the folder is no such encoder.
        """
        import torch

        if name not in FAMILIES:
            raise UserError(f"--retriever_name {name}: unknown; use bm25, {', '.join(FAMILIES)}")
        if pooling is not None and pooling not in get_args(Pooling):
            raise UserError(f"--pooling_method {pooling}: unknown; use one of {', '.join(get_args(Pooling)[:-1])}")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--retriever_name {name}: this machine has no GPU that PyTorch can use; run the encoder on cpu")
        self.name = name
        self.path = path
        self.family = replace(FAMILIES[name], pooling=pooling) if pooling else FAMILIES[name]
        self.max_length = max_length
        self._device = device
        torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            dtype or ("fp16" if device.startswith("cuda") else "fp32")
        ]
        try:
            if self.family.pooling == "own":
                self._load_sentence_transformer(torch_dtype)
            else:
                self._load_transformer(torch_dtype)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"--retriever_model {path}: cannot load an encoder: {error}") from error

    def _load_sentence_transformer(self, dtype: Any) -> None:
        from sentence_transformers import SentenceTransformer

        if not Path(self.path, "modules.json").is_file():
            raise UserError(f"--retriever_model {self.path}: no folder of sentence-transformers (modules.json is missing)")
        self._model: Any = SentenceTransformer(self.path, device=self._device, model_kwargs={"dtype": dtype})
        self.dimension = int(self._model.get_embedding_dimension())

    def _load_transformer(self, dtype: Any) -> None:
        import transformers

        config: Any = transformers.AutoConfig.from_pretrained(self.path)
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self.path)
        kind: Any = transformers.AutoModel
        if config.model_type == "dpr":  # AutoModel takes a question encoder, whatever the weights are
            kind = getattr(transformers, (config.architectures or ["DPRQuestionEncoder"])[0])
        model, loaded = kind.from_pretrained(self.path, dtype=dtype, output_loading_info=True)
        missing = [key for key in loaded["missing_keys"] if "pooler" not in key or self.family.pooling == "pooler"]
        if missing:
            raise UserError(f"--retriever_model {self.path}: has no weights for {missing[0]} and {len(missing) - 1} more")
        self._model = model.to(self._device).eval()
        # DPR encoders may project; 0 means that they do not.
        self.dimension = int(getattr(config, "projection_dim", 0) or config.hidden_size)

    def encode(self, texts: Sequence[str], role: Role) -> Vectors:
        """[len(texts), dimension] vectors; sorted by length inside, so that little is padded."""
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        if self.family.pooling == "own":
            encode = self._model.encode_query if role == "query" else self._model.encode_document
            return vectors if not texts else encode(list(texts), convert_to_numpy=True, show_progress_bar=False).astype("f4")
        prefix = self.family.query_prefix if role == "query" else self.family.passage_prefix
        if not texts:
            return vectors
        ids = self._tokenizer([prefix + text for text in texts], truncation=True, max_length=self.max_length)
        for rows in self._batches([len(row) for row in ids["input_ids"]]):
            inputs = self._tokenizer.pad({key: [ids[key][row] for row in rows] for key in ids}, return_tensors="pt")
            vectors[rows] = self._forward(inputs.to(self._device))
        return vectors

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Rows of about the same length, at most `BATCH_TOKENS` with their padding."""
        batch: list[int] = []
        for row in sorted(range(len(lengths)), key=lengths.__getitem__):
            if batch and (len(batch) + 1) * lengths[row] > BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _forward(self, inputs: Any) -> Vectors:
        import torch

        with torch.inference_mode():
            if self.family.pooling == "decoder":
                start = torch.zeros((len(inputs["input_ids"]), 1), dtype=torch.long, device=self._device)
                pooled = self._model(**inputs, decoder_input_ids=start).last_hidden_state[:, 0].float()
            else:
                pooled = self._pool(self._model(**inputs), inputs["attention_mask"])
            if self.family.normalise:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
            found: Vectors = pooled.cpu().numpy()
            return found

    def _pool(self, output: Any, mask: Any) -> Any:
        if self.family.pooling == "pooler":
            return output.pooler_output.float()
        if self.family.pooling == "cls":
            return output.last_hidden_state[:, 0].float()
        weights = mask[..., None].float()
        return (output.last_hidden_state.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


class CachedEncoder:
    """An encoder that remembers the vectors of the queries it saw last."""

    def __init__(self, encoder: Encoder, size: int) -> None:
        self._encoder = encoder
        self._size = size
        self._vectors: OrderedDict[str, Vectors] = OrderedDict()
        self._lock = threading.Lock()
        self.dimension = encoder.dimension
        self.hits = 0
        self.misses = 0

    def encode(self, texts: Sequence[str], role: Role) -> Vectors:
        """As the encoder's; passages are never remembered."""
        if role == "passage":
            return self._encoder.encode(texts, role)
        with self._lock:
            known = {text: self._vectors[text] for text in texts if text in self._vectors}
            for text in known:
                self._vectors.move_to_end(text)
            new = list(dict.fromkeys(text for text in texts if text not in known))
            self.hits += len(texts) - len(new)
            self.misses += len(new)
        known |= dict(zip(new, self._encoder.encode(new, role) if new else [], strict=True))
        with self._lock:
            self._vectors |= {text: known[text] for text in new}
            while len(self._vectors) > self._size:
                self._vectors.popitem(last=False)
        return np.stack([known[text] for text in texts]) if texts else np.empty((0, self.dimension), dtype=np.float32)


def weights_hash(path: str) -> str:
    """SHA-256 of an encoder's weight files: two folders with the same hash give the same vectors."""
    files = sorted(file for pattern in ("*.safetensors", "pytorch_model*.bin") for file in Path(path).glob(pattern))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while block := opened.read(16 << 20):
                digest.update(block)
    return digest.hexdigest()
