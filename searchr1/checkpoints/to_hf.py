"""Convert Megatron and FSDP checkpoints to folders that transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from rich.filesize import decimal
from torch import Tensor

from searchr1.checkpoints.compare import SMALL_BYTES, compare, compare_logits
from searchr1.checkpoints.fsdp_ranks import FsdpRanks
from searchr1.checkpoints.hf_folder import OUTPUT_LAYER, StoredWeights, check_shapes, local_folder, main_dtype
from searchr1.checkpoints.hf_writer import SHARD_BYTES, config_folder, copy_hf_files, stream_weights
from searchr1.checkpoints.locate import Carry, check_unused, locate, new_folder
from searchr1.checkpoints.lora import LoraRecord, LoraSource, check_base, write_adapter
from searchr1.checkpoints.manifest import verify_source
from searchr1.checkpoints.mapping import SliceReader
from searchr1.checkpoints.megatron_ranks import MegatronRanks
from searchr1.checkpoints.megatron_source import MegatronSource, is_megatron
from searchr1.checkpoints.model_folder import verify_weights, write_model_sums
from searchr1.checkpoints.model_shape import read_hf_config, read_megatron_shape
from searchr1.checkpoints.safetensors import TensorSpec
from searchr1.checkpoints.torch_dist import TensorFolder, TorchDistFolder
from searchr1.checkpoints.weight_check import ExpectedWeights
from searchr1.errors import UserError
from searchr1.progress import Advance, ProgressBar


class HfSource(Protocol):
    """A training checkpoint."""

    def specs(self) -> list[TensorSpec]:
        """Return what the folder will have, in the checkpoint's precision."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the same tensors, in the same order."""

    def pairs(self, read: SliceReader) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name, from the checkpoint, from the folder written), for all tensors."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a conversion into a Hugging Face folder."""

    dtype: torch.dtype | None = None
    """Precision of the output; None keeps the checkpoint's."""
    shard_bytes: int = SHARD_BYTES
    verify: bool = False
    verify_logits: bool = False
    carry: Carry | None = None


def write_folder(source: HfSource, config: Path, checkpoint: Path, output: Path, options: Options) -> list[str]:
    """Write `output` and compare it. Return what was done, line by line.

    Args:
        source: where the tensors come from.
        config: the folder whose configuration and tokenizer are copied.
        checkpoint: the actor's folder; what the model was trained with is looked for there and in its run.
        output: must not exist, or be empty.
        options: precision, sizes, comparisons.

    Raises:
        UserError: a damaged source, a disk problem, or an output that differs. Nothing is left behind.
    """
    stored = source.specs()
    specs = [replace(spec, dtype=options.dtype or spec.dtype) for spec in stored]
    total = sum(spec.nbytes for spec in specs)
    lines = []
    with new_folder(output, total) as folder:
        with ProgressBar("converting", total) as bar:
            sizes = {spec.name: spec.nbytes for spec in specs}
            stream_weights(specs, _counted(source.tensors(), sizes, bar.advance), folder, options.shard_bytes)
        copy_hf_files(config, folder, main_dtype(specs))
        carried = [options.carry(checkpoint, folder)] if options.carry is not None else []
        if options.verify:
            with StoredWeights.open(folder, pickles=False) as written:
                lines.append(compare(source.pairs(written.read), sum(spec.nbytes for spec in stored), options.dtype))
        if isinstance(source, MegatronSource) and (options.verify_logits or (options.verify and total <= SMALL_BYTES)):
            lines.append(compare_logits(source, config, folder, options.dtype))
        write_model_sums(folder)
    return [f"{len(specs)} tensors, {decimal(total)} -> {output}", *lines, *carried]


def _counted(named: Iterable[tuple[str, Tensor]], sizes: dict[str, int], advance: Advance) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in named:
        yield name, tensor
        del tensor  # before the next one is read
        advance(sizes[name])


_PREFIXES = ("fsdp_checkpoint.model.", "model.")
"""RLinf's and ours, before Hugging Face's names in a distributed checkpoint."""


def fsdp2hf(
    checkpoint: Path, output: Path, hf_model: Path | None = None, options: Options | None = None, *, adapter: bool = False
) -> list[str]:
    """Write `output`. Return what was done, line by line. A LoRA checkpoint is merged into its base model.

    Args:
        checkpoint: what a trainer saved: `…/global_step_N` or its `actor`, of this project, verl or RLinf.
        output: must not exist, or be empty.
        hf_model: whose configuration and tokenizer to take; None takes those kept in the checkpoint. Of a LoRA checkpoint,
            also where the base model's weights are; None is where they were in training.
        options: precision, sizes, comparisons.
        adapter: of a LoRA checkpoint, write the adapters alone, for peft.

    Raises:
        UserError: damaged or foreign checkpoint, or an output that is in use. Nothing is left behind.
    """
    check_unused(output)
    located = locate(checkpoint)
    verify_source(located.folder, "--checkpoint ")
    actor = located.folder
    if located.kind == "megatron_ranks":
        raise UserError(f"{actor} is a Megatron checkpoint: use searchr1 convert mg2hf")
    record = LoraRecord.read(actor)
    if adapter and record is None:
        raise UserError(f"--adapter: {actor} is no LoRA checkpoint; leave it out to convert the whole model")
    if located.kind != "distributed":
        config = config_folder(hf_model, actor)
        with closing(FsdpRanks(located)) as ranks:
            return write_folder(FsdpSource(ranks, expected_shapes(config)), config, actor, output, options or Options())
    with closing(TorchDistFolder(actor)) as folder:
        if adapter and record is not None:
            return write_adapter(folder, record, output, hf_model, (options or Options()).carry)
        config = config_folder(hf_model, actor)
        if record is not None:
            return _merge(folder, record, config, hf_model, output, options or Options())
        return write_folder(FsdpSource(folder, expected_shapes(config)), config, actor, output, options or Options())


def _merge(
    folder: TorchDistFolder, record: LoraRecord, config: Path, hf_model: Path | None, output: Path, options: Options
) -> list[str]:
    base = str(hf_model) if hf_model else record.base_model
    check_base(record, base, "--hf-model")
    verify_weights(local_folder(base))
    with StoredWeights.open(local_folder(base), pickles=False) as reader:
        source = LoraSource(folder, record, reader, expected_shapes(config), options.dtype)
        return write_folder(source, config, folder.folder, output, options)


class FsdpSource:
    """The model's tensors in an FSDP checkpoint: Hugging Face's own, in a distributed checkpoint under a prefix."""

    def __init__(self, folder: TensorFolder, expected: dict[str, tuple[int, ...]]) -> None:
        """Compare names and shapes.

        Raises:
            UserError: Megatron's checkpoint; missing, unexpected or misshapen tensors, by name.
        """
        if is_megatron(folder):
            raise UserError(f"{folder.folder} is a Megatron checkpoint: use searchr1 convert mg2hf")
        self._folder = folder
        self._prefix = ""
        if isinstance(folder, TorchDistFolder):
            self._prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in folder.tensors)), _PREFIXES[-1])
        prefixed = [key for key in folder.tensors if key.startswith(self._prefix)]
        found = {key.removeprefix(self._prefix): folder.shape(key) for key in prefixed}
        if not found:
            raise UserError(f"{folder.folder} has no tensors of a model: it is no FSDP training checkpoint")
        whole = lru_cache(maxsize=2)(folder.read)
        check_shapes(
            found,
            expected,
            str(folder.folder),
            tied=OUTPUT_LAYER not in expected,
            read=lambda name, _, start, stop: whole(self._prefix + name)[start:stop],
        )
        if OUTPUT_LAYER not in expected:  # tied: a second name of the embedding
            found.pop(OUTPUT_LAYER, None)
        self._names = list(found)

    def specs(self) -> list[TensorSpec]:
        """Return what the Hugging Face folder will have, in the checkpoint's precision."""
        keys = [(name, self._prefix + name) for name in self._names]
        return [TensorSpec(name, self._folder.shape(key), self._folder.dtype(key)) for name, key in keys]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors, in the order of `specs`."""
        for name in self._names:
            yield name, self._folder.read(self._prefix + name)

    def pairs(self, read: SliceReader) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name, from here, from a Hugging Face folder)."""
        for name in self._names:
            source = self._folder.read(self._prefix + name, check=True)
            yield name, source, read(name, 0, 0, len(source))


def expected_shapes(model_folder: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the model that config.json describes; a tied output layer is left out.

    Raises:
        UserError: config.json is not usable.
    """
    config = read_hf_config(model_folder)
    try:
        return ExpectedWeights.of(config).shapes
    except UserError as error:
        raise UserError(f"{model_folder}/{error}") from error


def mg2hf(checkpoint: Path, output: Path, hf_model: Path | None = None, options: Options | None = None) -> list[str]:
    """Write `output`. Return what was done, line by line.

    Args:
        checkpoint: what a trainer saved: `…/global_step_N` or its `actor`, a folder with
            `latest_checkpointed_iteration.txt`, an iteration's folder (`torch_dist` or `torch`).
        output: must not exist, or be empty.
        hf_model: whose configuration and tokenizer to take; None takes those kept in the checkpoint.
        options: precision, sizes, comparisons.

    Raises:
        UserError: damaged or foreign checkpoint, or an output that is in use. Nothing is left behind.
    """
    check_unused(output)
    located = locate(checkpoint)
    verify_source(located.folder, "--checkpoint ")
    if located.kind in ("fsdp_ranks", "full_weights"):
        raise UserError(f"{located.folder} is an FSDP checkpoint: use searchr1 convert fsdp2hf")
    with ExitStack() as stack:
        folder: TensorFolder
        if located.kind == "distributed":
            folder = stack.enter_context(closing(TorchDistFolder(located.folder)))
        config = config_folder(hf_model, located.folder)
        arch, _ = read_megatron_shape(config)
        if located.kind == "megatron_ranks":
            folder = stack.enter_context(closing(MegatronRanks(located.folder, arch.tied)))
        return write_folder(MegatronSource(folder, arch), config, located.folder, output, options or Options())
