"""`searchr1 convert`, which also carries searchr1.json from a checkpoint or its run into the new folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from searchr1.checkpoints.hf2mg import MegatronOptions, hf2mg
from searchr1.checkpoints.hf_writer import DTYPES
from searchr1.checkpoints.manifest import HF_FOLDER
from searchr1.checkpoints.to_hf import Options, fsdp2hf, mg2hf
from searchr1.config.load import leaves, load_config
from searchr1.config.schema import Config
from searchr1.data.model_settings import FILE, ModelSettings
from searchr1.errors import UserError
from searchr1.tracking.legs import read_settings


def carry_settings(checkpoint: Path, output: Path) -> str:
    """Write `output`/searchr1.json from the checkpoint's own, else from its run's config.yaml. Return what was done.

    Without either the file that was copied with the base model's tokenizer stays, if there is one.

    Args:
        checkpoint: the actor's folder, `RUN/checkpoints/global_step_N/actor`.
        output: the model folder, with its configuration and tokenizer.
    """
    kept, run = checkpoint / HF_FOLDER / FILE, _run_config(checkpoint)
    try:
        if kept.is_file():
            settings, source = ModelSettings.read(kept), kept
        elif run is not None:
            settings, source = ModelSettings.of(_recorded(run)), run
        elif (output / FILE).is_file():
            return f"{FILE}: that of the base model; the checkpoint has none, and no run's config.yaml lies above it"
        else:
            return (
                f"{FILE}: not written; the checkpoint has none, and no run's config.yaml lies above it. Ask the model with "
                "--config, or with the flags of its training"
            )
    except UserError as error:
        (output / FILE).unlink(missing_ok=True)
        return f"{FILE}: not written; ask the model with --config, or with the flags of its training ({error})"
    settings.write(output)
    return f"{FILE}: {settings.described()} (from {source})"


def _run_config(checkpoint: Path) -> Path | None:
    """Find config.yaml of the run whose `checkpoints/global_step_N` a checkpoint lies in."""
    folder = checkpoint.resolve()
    for step in (folder, *folder.parents[:3]):
        config = step.parent.parent / "config.yaml"
        if step.name.startswith("global_step_") and step.parent.name == "checkpoints" and config.is_file():
            return config
    return None


def _recorded(path: Path) -> Config:
    """Read a run's config.yaml, which a stranger may have written.

    Raises:
        UserError: not readable, or it refers to something outside of itself: what is carried may be published, and a
            reference can stand for a secret of whoever converts.
    """
    tree = read_settings(path)
    if "defaults" in tree or any("${" in str(value) for value in leaves(tree).values()):
        raise UserError(f"{path}: refers to other files or to the environment, which a run's own record never does")
    return load_config(path)


GIB = 1 << 30


def main(argv: list[str]) -> int:
    """Run `searchr1 convert`."""
    args = _parser().parse_args(argv)
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.shard_gib <= 0:
        raise UserError(f"--shard-gib {args.shard_gib}: must be above 0")
    size = int(args.shard_gib * GIB)
    if args.command == "hf2mg":
        lines = hf2mg(args.hf_model, args.output, MegatronOptions(dtype, args.layers, size, args.verify, args.verify_logits))
    else:
        options = Options(dtype, size, args.verify, getattr(args, "verify_logits", False), carry_settings)
        if args.command == "mg2hf":
            lines = mg2hf(args.checkpoint, args.output, args.hf_model, options)
        else:
            lines = fsdp2hf(args.checkpoint, args.output, args.hf_model, options, adapter=args.adapter)
    print("\n".join(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="searchr1 convert", description="Convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    mega = commands.add_parser("mg2hf", help="Megatron checkpoint -> Hugging Face folder")
    back = commands.add_parser("hf2mg", help="Hugging Face folder -> Megatron checkpoint")
    fsdp = commands.add_parser("fsdp2hf", help="FSDP checkpoint -> Hugging Face folder")
    for one in (mega, fsdp):
        one.add_argument("--checkpoint", type=Path, required=True, help="…/checkpoints/global_step_N/actor")
        one.add_argument(
            "--hf-model",
            type=Path,
            help="base model, for config and tokenizer (default: the checkpoint's own); with LoRA also its weights",
        )
    back.add_argument("--hf-model", type=Path, required=True, help="folder with config.json and safetensors files")
    back.add_argument(
        "--layers",
        choices=("stacked", "separate"),
        default="stacked",
        help="one tensor for all layers, Megatron's default, or one each (non_homogeneous_layers)",
    )
    for one in (mega, back, fsdp):
        one.add_argument("--output", type=Path, required=True, help="new folder")
        one.add_argument("--dtype", choices=sorted(DTYPES), help="precision of the output (default: as in the source)")
        one.add_argument("--shard-gib", type=float, default=4.0, help="size of a file, in GiB (default: 4)")
        one.add_argument("--verify", action="store_true", help="read the output back and compare every bit")
    fsdp.add_argument("--adapter", action="store_true", help="of a LoRA checkpoint: write the adapters alone, for peft")
    for one in (mega, back):
        one.add_argument("--verify-logits", action="store_true", help="also run both models, however large")
    return parser
