"""`searchr1 convert mg2hf`: a Megatron checkpoint -> a folder that transformers and vLLM load."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

from searchr1.actor.megatron.architecture import read_architecture
from searchr1.checkpoints.manifest import verify_source
from searchr1.convert.hf_writer import config_folder
from searchr1.convert.locate import locate
from searchr1.convert.megatron_ranks import MegatronRanks
from searchr1.convert.megatron_source import MegatronSource
from searchr1.convert.output import refuse_used
from searchr1.convert.to_hf import Options, write_folder
from searchr1.convert.torch_dist import TensorFolder, TorchDistFolder
from searchr1.errors import UserError


def mg2hf(checkpoint: Path, output: Path, hf_model: Path | None = None, options: Options | None = None) -> list[str]:
    """Write `output`. Returns what was done, line by line.

    Args:
        checkpoint: what a trainer saved: `…/global_step_N` or its `actor`, a folder with
            `latest_checkpointed_iteration.txt`, an iteration's folder (`torch_dist` or `torch`).
        output: must not exist, or be empty.
        hf_model: whose configuration and tokenizer to take; None takes those kept in the checkpoint.
        options: precision, sizes, comparisons.

    Raises:
        UserError: damaged or foreign checkpoint, or an output that is in use. Nothing is left behind.
    """
    refuse_used(output)
    located = locate(checkpoint)
    verify_source(located.folder, "--checkpoint ")
    if located.kind in ("fsdp_ranks", "full_weights"):
        raise UserError(f"{located.folder} is an FSDP checkpoint: use searchr1 convert fsdp2hf")
    with ExitStack() as stack:
        folder: TensorFolder
        if located.kind == "distributed":
            folder = stack.enter_context(closing(TorchDistFolder(located.folder)))
        config = config_folder(hf_model, located.folder)
        arch, _ = read_architecture(config)
        if located.kind == "megatron_ranks":
            folder = stack.enter_context(closing(MegatronRanks(located.folder, arch.tied)))
        return write_folder(MegatronSource(folder, arch), config, located.folder, output, options or Options())
