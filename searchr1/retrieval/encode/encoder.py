"""Text -> vectors with a Hugging Face encoder, with the prefixes and the pooling that its family was trained with."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from searchr1.checkpoints.model_folder import check_files
from searchr1.errors import UserError
from searchr1.files.text_rows import whole_text
from searchr1.retrieval.encode.model_files import local_folder

Role = Literal["query", "passage"]
Pooling = Literal["mean", "cls", "pooler", "decoder"]
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


FAMILIES: dict[str, Family | None] = {
    "e5": Family("query: ", "passage: ", "mean", True),
    "bge": Family("Represent this sentence for searching relevant passages: ", "", "cls", True),
    "dpr": Family("", "", "pooler", False),
    "t5": Family("", "", "mean", True),
    # A folder of the sentence-transformers library defines its own prefixes and pooling.
    "sentence-transformers": None,
}


def family_of(name: str, pooling: str | None) -> Family | None:
    """Return the family, with another pooling if one is given; None: the library of the folder decides.

    `decoder` is how Search-R1 uses T5: the decoder's state at its first step, not normalised.

    Raises:
        UserError: unknown family or pooling, or a pooling that the family cannot have.
    """
    if name not in FAMILIES:
        raise UserError(f"--retriever_name {name}: unknown; use bm25, {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    if pooling is None:
        return family
    if pooling not in get_args(Pooling):
        raise UserError(f"--pooling_method {pooling}: unknown; use one of {', '.join(get_args(Pooling))}")
    if family is None:
        raise UserError(f"--pooling_method {pooling}: {name} folders have their own pooling; leave the flag out")
    return replace(family, pooling=cast(Pooling, pooling), normalise=family.normalise and pooling != "decoder")


class Encoder:
    """An encoder on a processor (fp32, bf16) or a GPU (fp16 by default). Not for several threads at once."""

    def __init__(
        self,
        name: str,
        path: str,
        *,
        max_length: int = 256,
        device: str = "cpu",
        dtype: str | None = None,
        pooling: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        """Load an encoder of a family of `FAMILIES`; `max_length` is lowered to what the encoder can read.

        Raises:
            UserError: unknown family or pooling, no such device, or the folder is no such encoder.
        """
        import torch
        from safetensors import SafetensorError

        self.name = name
        self.family = family_of(name, pooling)
        self.dtype = check_device(device, dtype)
        self.path = local_folder(path)
        try:
            check_files(self.path)
        except UserError as error:
            raise UserError(f"--retriever_model {error}") from error
        self.max_length = max_length
        self.reads: Role | None = None
        """The only role that it was trained for; None: both."""
        self._device = device
        self._batch_tokens = batch_tokens
        torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]
        try:
            if self.family is None:
                self._load_sentence_transformer(torch_dtype)
            else:
                self._load_transformer(torch_dtype, self.family)
        except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
            raise UserError(f"--retriever_model {path}: cannot load an encoder: {error}") from error

    @property
    def pooling(self) -> str:
        """The pooling of the token vectors; `own` if the folder defines it."""
        return self.family.pooling if self.family else "own"

    def _load_sentence_transformer(self, dtype: Any) -> None:
        from sentence_transformers import SentenceTransformer

        if not Path(self.path, "modules.json").is_file():
            raise UserError(f"--retriever_model {self.path}: no folder of sentence-transformers (modules.json is missing)")
        self._model: Any = SentenceTransformer(
            self.path, device=self._device, trust_remote_code=False, model_kwargs={"dtype": dtype}
        )
        self.max_length = int(min(self._model.max_seq_length or self.max_length, self.max_length))
        self._model.max_seq_length = self.max_length
        self.dimension = int(self._model.get_embedding_dimension())

    def _load_transformer(self, dtype: Any, family: Family) -> None:
        import transformers

        if dense := sorted(Path(self.path).glob("*_Dense")):
            raise UserError(
                f"--retriever_model {self.path}: ends in a layer ({dense[0].name}) that --retriever_name {self.name} would "
                "leave out; use --retriever_name sentence-transformers"
            )
        config: Any = transformers.AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        kind = self._kind(config, family)
        model, loaded = kind.from_pretrained(self.path, dtype=dtype, output_loading_info=True, trust_remote_code=False)
        missing = [key for key in sorted(loaded["missing_keys"]) if "pooler" not in key or family.pooling == "pooler"]
        if missing:
            raise UserError(f"--retriever_model {self.path}: has no weights for {missing[0]} and {len(missing) - 1} more")
        self._model = model.to(self._device).eval()
        limit = getattr(config, "max_position_embeddings", None) or self.max_length
        self.max_length = min(self.max_length, self._tokenizer.model_max_length, limit)
        # DPR encoders may project; 0 means that they do not.
        self.dimension = int(getattr(config, "projection_dim", 0) or config.hidden_size)

    def _kind(self, config: Any, family: Family) -> Any:
        """Return the class of the model: AutoModel would take DPR's question encoder always, and load T5's decoder."""
        import transformers

        if config.model_type == "dpr":
            name = (config.architectures or ["DPRQuestionEncoder"])[0]
            roles: dict[str, Role] = {"DPRQuestionEncoder": "query", "DPRContextEncoder": "passage"}
            if name not in roles or family.pooling != "pooler":
                raise UserError(f"--retriever_model {self.path}: a {name} cannot be used with pooling {family.pooling}")
            self.reads = roles[name]
            return getattr(transformers, name)
        t5 = "t5" in config.model_type  # the config of one that was saved without its decoder does not mention it
        if (family.pooling == "decoder" or config.is_encoder_decoder) and not t5:
            raise UserError(
                f"--retriever_model {self.path}: pooling {family.pooling} cannot be used with {config.model_type}"
            )
        if t5 and family.pooling != "decoder":
            return transformers.AutoModelForTextEncoding
        return transformers.AutoModel

    def encode(self, texts: Sequence[str], role: Role) -> Vectors:
        """Return [len(texts), dimension] vectors; texts are sorted by length inside, so that little is padded."""
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return vectors
        if self.family is None:
            encode = self._model.encode_query if role == "query" else self._model.encode_document
            size = max(self._batch_tokens // self.max_length, 1)
            vectors[:] = encode(list(texts), batch_size=size, convert_to_numpy=True, show_progress_bar=False)
            return vectors
        prefix = self.family.query_prefix if role == "query" else self.family.passage_prefix
        ids = self._tokenizer([prefix + whole_text(text) for text in texts], truncation=True, max_length=self.max_length)
        for rows in batches([len(row) for row in ids["input_ids"]], self._batch_tokens):
            inputs = self._tokenizer.pad({key: [ids[key][row] for row in rows] for key in ids}, return_tensors="pt")
            vectors[rows] = self._forward(inputs.to(self._device), self.family)
        return vectors

    def _forward(self, inputs: Any, family: Family) -> Vectors:
        import torch

        with torch.inference_mode():
            if family.pooling == "decoder":
                start = torch.zeros((len(inputs["input_ids"]), 1), dtype=torch.long, device=self._device)
                output = self._model(**inputs, decoder_input_ids=start)
            else:
                output = self._model(**inputs)
            pooled = pool(output, inputs["attention_mask"], family.pooling)
            if family.normalise:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
            vectors: Vectors = pooled.cpu().numpy()
            return vectors


def pool(output: Any, mask: Any, pooling: Pooling) -> Any:
    """Pool a model's output to [texts, dimension] in fp32; `mask` is [texts, tokens], 0 for padding."""
    if pooling == "pooler":
        return output.pooler_output.float()
    states = output.last_hidden_state.float()
    if pooling != "mean":
        return states[:, 0]
    weights = mask[..., None].float()
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield rows of about the same length together, at most so many tokens with their padding (or one row)."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def check_device(device: str, dtype: str | None) -> str:
    """Return the number format of the weights on a device: `dtype`, or else fp16 on a GPU and fp32 on a processor.

    Raises:
        UserError: no such device, or it cannot compute in that format.
    """
    import torch

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: unknown; use cpu, cuda or cuda:NUMBER") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no GPU that PyTorch can use; run the encoder on cpu")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
    if place.type == "cpu" and dtype == "fp16":
        raise UserError("--dtype fp16: needs a GPU; use fp32 or bf16 on a processor")
    return dtype or ("fp16" if place.type == "cuda" else "fp32")


class CachedEncoder:
    """An encoder that remembers the vectors of the queries it saw last. For several threads at once."""

    def __init__(self, encoder: Encoder, size: int) -> None:
        """Remember the vectors of `size` queries, 4 * dimension bytes each."""
        self._encoder = encoder
        self._size = size
        self._vectors: OrderedDict[str, Vectors] = OrderedDict()
        self._lock = threading.Lock()
        self._encoding = threading.Lock()
        self.dimension = encoder.dimension
        self.hits = 0
        self.misses = 0

    def encode(self, texts: Sequence[str], role: Role) -> Vectors:
        """Encode as the encoder does; passages are never remembered."""
        if role == "passage":
            with self._encoding:
                return self._encoder.encode(texts, role)
        with self._lock:
            known = {text: self._vectors[text] for text in texts if text in self._vectors}
            for text in known:
                self._vectors.move_to_end(text)
            new = list(dict.fromkeys(text for text in texts if text not in known))
            self.hits += len(texts) - len(new)
            self.misses += len(new)
        if new:
            with self._encoding:
                encoded = self._encoder.encode(new, role)
            # Copies: a row that is remembered must not keep its whole batch in memory.
            known |= {text: vector.copy() for text, vector in zip(new, encoded, strict=True)}
            with self._lock:
                self._vectors |= {text: known[text] for text in new}
                while len(self._vectors) > self._size:
                    self._vectors.popitem(last=False)
        return np.stack([known[text] for text in texts]) if texts else np.empty((0, self.dimension), dtype=np.float32)
