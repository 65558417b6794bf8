"""What `mg2hf` and `fsdp2hf` share: from a source of tensors to a finished, compared folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from rich.filesize import decimal
from torch import Tensor

from searchr1.actor.megatron.mapping import SliceReader
from searchr1.checkpoints.model_sums import write_model_sums
from searchr1.convert.hf_reader import HfReader, main_dtype
from searchr1.convert.hf_writer import SHARD_BYTES, copy_hf_files, stream_weights
from searchr1.convert.megatron_source import MegatronSource
from searchr1.convert.output import new_folder
from searchr1.convert.progress import progress_bar
from searchr1.convert.run_settings import carry_settings
from searchr1.convert.safetensors_file import TensorSpec
from searchr1.convert.verify import SMALL_BYTES, compare, compare_logits


class HfSource(Protocol):
    """A training checkpoint."""

    def specs(self) -> list[TensorSpec]:
        """What the folder will have, in the checkpoint's precision."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, in the same order."""

    def pairs(self, read: SliceReader) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, from the checkpoint, from the folder written), for all tensors."""


@dataclass(frozen=True, slots=True)
class Options:
    """Of a conversion into a Hugging Face folder."""

    dtype: torch.dtype | None = None
    """Of the output; None keeps the checkpoint's."""
    shard_bytes: int = SHARD_BYTES
    verify: bool = False
    verify_logits: bool = False


def write_folder(source: HfSource, config: Path, checkpoint: Path, output: Path, options: Options) -> list[str]:
    """Write `output` and compare it. Returns what to tell the user, line by line.

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
        with progress_bar("converting", total) as advance:
            sizes = {spec.name: spec.nbytes for spec in specs}
            stream_weights(specs, _told(source.tensors(), sizes, advance), folder, options.shard_bytes)
        copy_hf_files(config, folder, main_dtype(specs))
        settings_line = carry_settings(checkpoint, folder)
        if options.verify:
            with HfReader.open(folder) as written:
                lines.append(compare(source.pairs(written.read), sum(spec.nbytes for spec in stored), options.dtype))
        if isinstance(source, MegatronSource) and (options.verify_logits or (options.verify and total <= SMALL_BYTES)):
            lines.append(compare_logits(source, config, folder, options.dtype))
        write_model_sums(folder)
    return [f"{len(specs)} tensors, {decimal(total)} -> {output}", *lines, settings_line]


def _told(
    named: Iterable[tuple[str, Tensor]], sizes: dict[str, int], advance: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in named:
        yield name, tensor
        del tensor  # before the next one is read
        advance(sizes[name])
