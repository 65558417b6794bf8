"""A check that a model folder's weights are those that its config.json describes: from headers, before anything starts.

One reading for every command. It is as strict as the strictest of FSDP (transformers), Megatron and the engine: what one of
them would leave random, rename or tie in its own way is rejected for all.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from searchr1.checkpoints.hf_folder import (
    HEADS,
    OUTPUT_LAYER,
    StoredWeights,
    check_shapes,
    reject_misfits,
)
from searchr1.checkpoints.model_folder import ADAPTER, check_files
from searchr1.checkpoints.model_shape import read_hf_config
from searchr1.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExpectedWeights:
    """What config.json describes."""

    shapes: dict[str, tuple[int, ...]]
    """Shapes of every stored tensor; a tied output layer is left out."""
    floating: set[str]
    """Names of those that are real numbers."""
    tied: bool
    ignored: tuple[str, ...]
    """Patterns of names that the architecture does without."""
    renamed: bool
    """transformers renames or fuses tensors of this family while it reads them, so names alone say nothing."""

    @classmethod
    def of(cls, config: Any) -> ExpectedWeights:
        """Describe a transformers configuration; no memory is taken.

        Raises:
            UserError: it is of no causal language model.
        """
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (ValueError, KeyError) as error:
            raise UserError(f"config.json: no causal language model ({str(error).splitlines()[0]})") from error
        model.tie_weights()
        copies = set(model.all_tied_weights_keys)
        state = {name: value for name, value in model.state_dict().items() if name not in copies}
        return cls(
            {name: tuple(value.shape) for name, value in state.items()},
            {name for name, value in state.items() if value.is_floating_point()},
            OUTPUT_LAYER in copies,
            tuple(model._keys_to_ignore_on_load_unexpected or ()),
            renames_tensors(model),
        )


def renames_tensors(model: Any) -> bool:
    """Return whether transformers renames or fuses this model's tensors while it reads them (mixtures of experts)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def check_model_folder(source: str | Path, *, decoder_only: bool = False, trained: bool = True) -> None:
    """Reject a local model folder whose weights do not fit its config.json; a hub name is checked when it is loaded.

    Args:
        source: a folder or a hub name.
        decoder_only: for a critic, whose head is new: the folder's own head may be missing, and is not used.
        trained: False for a model that only the engine runs, which may be quantized or of a family that it alone has.

    Raises:
        UserError: names what is missing, unexpected, misshapen, quantized, damaged or ambiguous, and the likely cause.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    check_files(folder)
    config = _config(folder)
    quantized = getattr(config, "quantization_config", None)
    if quantized and trained:
        raise UserError(f"{folder}: config.json has a quantization_config; train the unquantized model")
    if quantized:
        return  # the engine's own formats, with names of their own
    try:
        expected = ExpectedWeights.of(config)
    except UserError as error:
        if not trained:
            logger.warning("%s: its weights are not checked (%s)", folder, error)
            return
        raise UserError(f"{folder}/{error}") from error
    with StoredWeights.open(folder) as stored:
        if expected.renamed:
            _check_by_loading(folder)
        else:
            _check_stored(stored, expected, folder, decoder_only)
        _check_precisions(stored, expected, folder)
    _check_tokenizer(folder, config.vocab_size)


def _check_stored(stored: StoredWeights, expected: ExpectedWeights, folder: Path, decoder_only: bool) -> None:
    known = {
        name: shape
        for name, shape in stored.shapes.items()
        if name in expected.shapes or not any(re.search(pattern, name) for pattern in expected.ignored)
    }
    shapes = dict(expected.shapes)
    if decoder_only:
        shapes.pop(OUTPUT_LAYER, None)
        unused = sorted(name for name in known if name.startswith(HEADS))
        if unused:
            logger.warning("%s: %s not used: the critic's head is new and starts at 0", folder, ", ".join(unused))
    check_shapes(
        known,
        shapes,
        str(folder),
        tied=expected.tied and not decoder_only,
        read=stored.read,
        allowed=(OUTPUT_LAYER, *HEADS) if decoder_only else (),
    )


def _check_by_loading(folder: Path) -> None:
    """Let transformers match the names, which reads no data onto the meta device."""
    from transformers import AutoModelForCausalLM

    load_pretrained(AutoModelForCausalLM, str(folder), device_map="meta")


def _check_precisions(stored: StoredWeights, expected: ExpectedWeights, folder: Path) -> None:
    for name, spec in stored.specs.items():
        dtype = spec.dtype
        if name in expected.floating and (not dtype.is_floating_point or dtype.itemsize == 1):
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"{folder}: {name} is stored as {kind}: the weights are quantized; use the unquantized model")


def load_pretrained(kind: Any, path: str, *, decoder_only: bool = False, **settings: Any) -> Any:
    """Return a transformers model of which every tensor came from the files.

    Args:
        kind: the transformers class that reads it.
        path: a folder or hub name.
        decoder_only: heads in the files are not used.
        settings: of `from_pretrained`.

    Raises:
        UserError: no model there, or tensors are missing, unexpected or misshapen, by name.
    """
    try:
        model, report = kind.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **settings
        )
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot load a model from {path}: {error}") from error
    allowed = (OUTPUT_LAYER, *HEADS) if decoder_only else ()
    unexpected = sorted(name for name in report["unexpected_keys"] if not name.startswith(allowed or ("\0",)))
    misshapen = {name: (tuple(found), tuple(own)) for name, found, own in report["mismatched_keys"]}
    reject_misfits(sorted(report["missing_keys"]), unexpected, misshapen, path)
    output = model.get_output_embeddings()
    untied = output is not None and output.weight is not model.get_input_embeddings().weight
    if untied and model.config.tie_word_embeddings and not output.weight.is_meta:
        raise UserError(
            f"{path}: config.json says tie_word_embeddings: true, but {OUTPUT_LAYER} differs from the embedding; set "
            f"tie_word_embeddings to false if the model was trained untied, or remove {OUTPUT_LAYER} from the files"
        )
    assert isinstance(model, nn.Module)
    return model


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER).is_file():
            raise UserError(
                f"{folder}: holds LoRA adapters ({ADAPTER}), not a model; merge them into their base model (peft's "
                "merge_and_unload, or searchr1 convert fsdp2hf of the checkpoint) and give that folder"
            )
        raise UserError(f"{folder}: has no config.json; give a model folder")
    return read_hf_config(folder)


def _check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Reject tokens beyond the embedding, which would stop the first prompt that has one; warn of added ones."""
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [int(item["id"]) for item in tokenizer.get("added_tokens") or ()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # there is none, or of another kind; it is read when it is used
    if max(set(ids) - set(added), default=0) >= vocab_size:
        raise UserError(
            f"{folder}: tokenizer.json has tokens up to {max(ids)}, but config.json says vocab_size={vocab_size}; use the "
            "tokenizer that belongs to the model"
        )
    beyond = [number for number in added if number >= vocab_size]
    if beyond:
        text = "%s: %d added tokens of tokenizer.json have no embedding (vocab_size=%d)"
        logger.warning(text, folder, len(beyond), vocab_size)
