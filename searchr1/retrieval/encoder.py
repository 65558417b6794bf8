"""Text -> vectors with a Hugging Face encoder, with the prefixes and the pooling that its family was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from searchr1.errors import UserError

Role = Literal["query", "passage"]


@dataclass(frozen=True, slots=True)
class Family:
    """How a family of encoders is used."""

    query_prefix: str
    passage_prefix: str
    pooling: Literal["mean", "cls", "pooler"]
    normalise: bool


FAMILIES = {
    "e5": Family("query: ", "passage: ", "mean", True),
    "bge": Family("Represent this sentence for searching relevant passages: ", "", "cls", True),
    "dpr": Family("", "", "pooler", False),
}


class Encoder:
    """An encoder on the CPU (fp32) or a GPU (fp16). Not for several threads at once."""

    def __init__(self, name: str, path: str, *, max_length: int = 256, device: str = "cpu", batch_size: int = 64) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        if name not in FAMILIES:
            raise UserError(f"--retriever_name {name}: unknown; use bm25, {', '.join(FAMILIES)}")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--retriever_name {name}: this machine has no GPU that PyTorch can use; run the encoder on cpu")
        self.family = FAMILIES[name]
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            self._model: Any = AutoModel.from_pretrained(path, dtype=dtype).to(device).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"--retriever_model {path}: cannot load an encoder: {error}") from error
        self._device = device
        self._max_length = max_length
        self._batch_size = batch_size
        # DPR encoders may project; 0 means that they do not.
        self.dimension = int(getattr(self._model.config, "projection_dim", 0) or self._model.config.hidden_size)

    def encode(self, texts: Sequence[str], role: Role) -> npt.NDArray[np.float32]:
        """[len(texts), dimension] vectors; sorted by length inside, so that little is padded."""
        import torch

        prefix = self.family.query_prefix if role == "query" else self.family.passage_prefix
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            inputs = self._tokenizer(
                [prefix + texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            ).to(self._device)
            with torch.inference_mode():
                output = self._model(**inputs)
            vectors[rows] = self._pool(output, inputs["attention_mask"]).cpu().numpy()
        return vectors

    def _pool(self, output: Any, mask: Any) -> Any:
        import torch

        if self.family.pooling == "pooler":
            pooled = output.pooler_output.float()
        elif self.family.pooling == "cls":
            pooled = output.last_hidden_state[:, 0].float()
        else:
            weights = mask[..., None].float()
            pooled = (output.last_hidden_state.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.family.normalise else pooled
