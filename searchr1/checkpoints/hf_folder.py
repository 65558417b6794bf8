"""A Hugging Face folder of weights: its files, its index, and whether its tensors are those of a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from searchr1.checkpoints.mapping import SliceReader
from searchr1.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING, OUTPUT_LAYER = "model.embed_tokens.weight", "lm_head.weight"
HEADS = ("score.", "v_head.", "value_head.", "classifier.", "summary.")
"""How the heads of reward models and critics begin; only a critic's decoder may be taken out from under one."""
_QUANTIZED = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax")
_NAMED = 3
_COMPARED_ELEMENTS = 16 << 20


def check_shapes(
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    where: str,
    *,
    tied: bool,
    read: SliceReader,
    allowed: tuple[str, ...] = (),
) -> None:
    """Reject weights that do not fit; a second copy of a tied output layer must equal the embedding.

    Args:
        found: names and shapes that are stored.
        expected: those of the architecture, a tied output layer left out.
        where: the folder, for messages.
        tied: the output layer is the embedding.
        read: reads slices of what is stored.
        allowed: beginnings of names that may be stored beside.

    Raises:
        UserError: missing, unexpected or misshapen tensors, by name; two different output layers.
    """
    found = {name: shape for name, shape in found.items() if name in expected or not name.startswith(allowed or ("\0",))}
    copy = found.pop(OUTPUT_LAYER, None) if tied and OUTPUT_LAYER not in expected else None
    check_names(found, expected, where)
    if copy is None:
        return
    rows = expected[EMBEDDING][0]
    step = max(1, _COMPARED_ELEMENTS // expected[EMBEDDING][1])
    spans = ((start, min(start + step, rows)) for start in range(0, rows, step))
    if copy != expected[EMBEDDING] or not all(
        torch.equal(read(OUTPUT_LAYER, 0, *span), read(EMBEDDING, 0, *span)) for span in spans
    ):
        raise UserError(
            f"{where}: config.json says tie_word_embeddings: true, but {OUTPUT_LAYER} differs from {EMBEDDING}; set "
            f"tie_word_embeddings to false if the model was trained untied, or remove {OUTPUT_LAYER} from the files"
        )


def check_names(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Reject what does not fit the architecture.

    Raises:
        UserError: missing, unexpected or misshapen tensors, by name, with the likely cause.
    """
    refuse_misfits(
        [name for name in expected if name not in found],
        [name for name in found if name not in expected and not name.endswith("rotary_emb.inv_freq")],
        {name: (found[name], shape) for name, shape in expected.items() if name in found and found[name] != shape},
        where,
    )


def refuse_misfits(
    missing: list[str],
    unexpected: list[str],
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    where: str,
) -> None:
    """Reject tensors that do not fit, with the likely cause.

    Args:
        missing: names that the model has and the files have not.
        unexpected: the opposite.
        misshapen: the shape stored and the model's own.
        where: the folder, for messages.

    Raises:
        UserError: there are some.
    """
    problems = []
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            problems.append(f"{kind} {_first(names)}")
    if misshapen:
        problems.append(_first([f"{name} is {stored} instead of {own}" for name, (stored, own) in misshapen.items()]))
    if problems:
        cause = _likely_cause(missing, unexpected, misshapen)
        raise UserError(f"{where}: does not fit the model's config.json: {'; '.join(problems)}. {cause}")


def _first(texts: list[str]) -> str:
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + more


def _likely_cause(
    missing: list[str], unexpected: list[str], misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> str:
    """Return what probably happened and what to do about it."""
    if any("lora_" in name or ".base_layer." in name for name in unexpected):
        return "These are LoRA adapters or a model that still carries them; merge them into the base model and save that"
    if any(name.endswith(_QUANTIZED) for name in unexpected):
        return "The weights are quantized; use the unquantized model"
    extra = _extra_prefix(missing, unexpected)
    if extra:
        return (
            f"The names in the files begin with {extra}, left by a wrapper (torch.compile, DDP, FSDP, a trainer); save "
            "the unwrapped model, or rename the tensors"
        )
    lacking = _extra_prefix(unexpected, missing)
    if lacking:
        return f"The names in the files lack {lacking}: the bare decoder was saved; save the model with its output layer"
    if missing == ["output_layer.weight"] and not unexpected and not misshapen:
        return "The checkpoint is of a tied model; give its base model's folder, whose config.json says so, as --hf-model"
    if missing == [OUTPUT_LAYER] and not unexpected and not misshapen:
        return (
            "Untied models store their output layer; if the output layer is the embedding, set tie_word_embeddings: true in "
            "config.json (where it is left out, the family's default counts)"
        )
    if unexpected and all(name.startswith(HEADS) for name in unexpected) and not missing and not misshapen:
        return "A reward model or critic was saved, or a model with a value head; use the language model itself"
    if misshapen and not missing and not unexpected:
        if set(misshapen) <= {EMBEDDING, OUTPUT_LAYER}:
            return "Set vocab_size in config.json to the rows that are stored, or use the files that belong to it"
        return "The files are of a model of another size; use the config.json that belongs to them"
    if missing and not unexpected and not misshapen:
        return "A file was not copied or not saved whole, or config.json is of a larger model; get the folder again"
    return "config.json and the files are of different models; use those that belong together"


def _extra_prefix(plain: list[str], longer: list[str]) -> str | None:
    """Return what stands before the names of `plain` in most of `longer`; None if nothing does."""
    known = set(plain)
    counts: dict[str, int] = {}
    for name in longer:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in known:
                prefix = ".".join(parts[:cut]) + "."
                counts[prefix] = counts.get(prefix, 0) + 1
                break
    most = max(counts.values(), default=0)
    return next((prefix for prefix, count in counts.items() if count == most and 2 * count > len(longer)), None)


def local_folder(source: str | Path) -> Path:
    """Return a folder as it is, or the snapshot of a hub name, downloaded if need be.

    Raises:
        UserError: neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise UserError(f"{source} is neither a folder nor a model that can be downloaded ({error})") from error


def weight_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files of a model folder.

    Raises:
        UserError: there are none or more than belong together, or the index is damaged.
    """
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        if SINGLE in present:
            raise UserError(
                f"{folder}: has both {SINGLE} and {INDEX}, and libraries differ in which they read; remove the stale one"
            )
        return sorted(set(read_index(folder / INDEX).values()))
    if SINGLE not in present:
        pickled = " (load the model with transformers and save_pretrained it)" if any(folder.glob("*.bin")) else ""
        raise UserError(f"{folder}: no {SINGLE} and no {INDEX}; weights must be in safetensors files{pickled}")
    others = [name for name in present if name != SINGLE]
    if others:
        raise UserError(
            f"{folder}: has {_first(others)} beside {SINGLE}, which the engine would read too; move what is no part of the "
            "model elsewhere"
        )
    return [SINGLE]


def read_index(path: Path) -> dict[str, str]:
    """Return the file of every tensor that an index lists.

    Raises:
        UserError: it is damaged, or names a file outside of the folder.
    """
    try:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        outside = [name for name in found.values() if Path(name).name != name or not name or "\0" in name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:200]}); get it again") from error
    if outside:
        raise UserError(f"{path} names {outside[0][:200]!r}, which is outside of the folder; get it again")
    return found
