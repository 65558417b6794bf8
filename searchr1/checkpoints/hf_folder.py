"""A Hugging Face folder of weights: its files, its index, and tensors read by slices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from searchr1.checkpoints.mapping import VALUE_HEAD, SliceReader, hugging_face_shapes
from searchr1.checkpoints.model_shape import ModelShape
from searchr1.checkpoints.safetensors import SafetensorsReader, TensorSpec
from searchr1.checkpoints.torch_files import load_weights
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
    reject_misfits(
        [name for name in expected if name not in found],
        [name for name in found if name not in expected and not name.endswith("rotary_emb.inv_freq")],
        {name: (found[name], shape) for name, shape in expected.items() if name in found and found[name] != shape},
        where,
    )


def reject_misfits(
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
            f"{folder}: has {_first(others)} beside {SINGLE}, which the engine would read too; move what is not part of the "
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


PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class StoredWeights:
    """Open files and which tensor is in which. Use `open`."""

    def __init__(self, folder: Path, files: dict[str, SafetensorsReader], tensors: dict[str, Tensor]) -> None:
        self.folder = folder
        self.specs = {name: file.specs[name] for name, file in files.items()}
        self.specs |= {name: TensorSpec(name, tuple(value.shape), value.dtype) for name, value in tensors.items()}
        self._files, self._tensors = files, tensors

    @classmethod
    @contextmanager
    def open(cls, folder: Path, *, pickles: bool = True) -> Iterator[StoredWeights]:
        """Read the headers of the safetensors files, or of `pytorch_model.bin` where there are none.

        Args:
            folder: of the model.
            pickles: False rejects `pytorch_model.bin`.

        Raises:
            UserError: no weights; a file is missing, cut short, unsafe or holds another's tensor, by name.
        """
        if pickles and not _has_safetensors(folder) and _has_pickles(folder):
            yield cls(folder, {}, _read_pickles(folder))
            return
        with ExitStack() as stack:
            files: dict[str, SafetensorsReader] = {}
            for file in weight_files(folder):
                try:
                    reader = SafetensorsReader(folder / file)
                except UserError as error:
                    hint = f"; {INDEX} names it" if not (folder / file).exists() else ""
                    raise UserError(f"{error}{hint}") from error
                stack.callback(reader.close)
                for name in reader.specs:
                    if name in files:
                        raise UserError(
                            folder, f"{name} is in both {files[name].path.name} and {file}; get the folder again"
                        )
                    files[name] = reader
            if (folder / INDEX).is_file():
                _check_index(folder, {name: reader.path.name for name, reader in files.items()})
            yield cls(folder, files, {})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        return {name: spec.shape for name, spec in self.specs.items()}

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return part of a tensor along one dimension; only that part is read."""
        if name in self._tensors:
            return self._tensors[name].narrow(dim, start, stop - start)
        return self._files[name].read(name, dim, start, stop)

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor."""
        return self.read(name, 0, 0, self.specs[name].shape[0])

    def dtype(self) -> torch.dtype:
        """Return the precision of most of the bytes."""
        return main_dtype(list(self.specs.values()))

    def check(self, arch: ModelShape) -> None:
        """Compare names and shapes with a model's; of a critic's, whose head is new, the decoder alone.

        Raises:
            UserError: missing, unexpected or misshapen tensors, by name; an output layer that should be the embedding.
        """
        expected = {name: shape for name, shape in hugging_face_shapes(arch).items() if name != VALUE_HEAD}
        allowed = (OUTPUT_LAYER, *HEADS) if arch.value_head else ()
        self.check_shapes(expected, tied=arch.tied and not arch.value_head, allowed=allowed)

    def check_shapes(self, expected: dict[str, tuple[int, ...]], *, tied: bool, allowed: tuple[str, ...] = ()) -> None:
        """Compare names and shapes as `hf_folder.check_shapes` does.

        Raises:
            UserError: missing, unexpected or misshapen tensors, by name; an output layer that should be the embedding.
        """
        check_shapes(self.shapes, expected, str(self.folder), tied=tied, read=self.read, allowed=allowed)


def main_dtype(specs: list[TensorSpec]) -> torch.dtype:
    """Return the precision that takes the most bytes; a configuration names one, though norms may be kept in another."""
    totals: dict[torch.dtype, int] = {}
    for spec in specs:
        totals[spec.dtype] = totals.get(spec.dtype, 0) + spec.nbytes
    return max(totals, key=lambda dtype: totals[dtype])


def has_weights(folder: Path) -> bool:
    """Return whether there are weights in a format that is read."""
    return _has_safetensors(folder) or _has_pickles(folder)


def _has_safetensors(folder: Path) -> bool:
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def _has_pickles(folder: Path) -> bool:
    return (folder / PICKLED).is_file() or (folder / PICKLED_INDEX).is_file()


def _read_pickles(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of `pytorch_model.bin` files, mapped into memory; nothing in them is run."""
    files = [PICKLED]
    if (folder / PICKLED_INDEX).is_file():
        files = sorted(set(read_index(folder / PICKLED_INDEX).values()))
    found: dict[str, Tensor] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path} is missing; {PICKLED_INDEX} names it")
        part = load_weights(path)
        for name in part:
            if name in found:
                raise UserError(f"{folder}: {name} is in two files; get the folder again")
        found |= part
    return found


def _check_index(folder: Path, places: dict[str, str]) -> None:
    wrong = [name for name, file in read_index(folder / INDEX).items() if places.get(name) != file]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{folder / INDEX} does not fit its files: {', '.join(wrong[:3])}{more} not where it lists them; get the folder "
            "again"
        )
