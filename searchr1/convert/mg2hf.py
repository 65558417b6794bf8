"""`searchr1 convert mg2hf`: a Megatron checkpoint -> a folder that transformers and vLLM load."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from searchr1.actor.megatron.architecture import read_architecture
from searchr1.convert.hf_writer import config_folder
from searchr1.convert.megatron_source import MegatronSource
from searchr1.convert.output import refuse_used
from searchr1.convert.to_hf import Options, write_folder
from searchr1.convert.torch_dist import TorchDistFolder, find_checkpoint


def mg2hf(checkpoint: Path, output: Path, hf_model: Path | None = None, options: Options | None = None) -> list[str]:
    """Write `output`. Returns what was done, line by line.

    Args:
        checkpoint: `…/global_step_N/actor`, `…/global_step_N`, or any `torch_dist` folder.
        output: must not exist, or be empty.
        hf_model: whose configuration and tokenizer to take; None takes those kept in the checkpoint.
        options: precision, sizes, comparisons.

    Raises:
        UserError: damaged or foreign checkpoint, or an output that is in use. Nothing is left behind.
    """
    refuse_used(output)
    actor = find_checkpoint(checkpoint)
    with closing(TorchDistFolder(actor)) as folder:
        config = config_folder(hf_model, actor)
        arch, _ = read_architecture(config)
        return write_folder(MegatronSource(folder, arch), config, actor, output, options or Options())
