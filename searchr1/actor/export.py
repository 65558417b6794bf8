"""`searchr1 convert fsdp2hf`: a training checkpoint -> a folder that transformers and vLLM load.

Needs no GPU and no process group, and holds one output shard in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from searchr1.actor.checkpoint import HF_FOLDER, verify_checkpoint
from searchr1.errors import UserError

SHARD_BYTES = 4 << 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INDEX = "model.safetensors.index.json"


def convert(checkpoint: Path, output: Path, hf_model: Path | None, dtype: torch.dtype | None) -> int:
    """Write `output`. Returns the number of tensors.

    Args:
        checkpoint: `…/global_step_N/actor` (or `…/global_step_N`).
        output: must not exist, or be empty.
        hf_model: whose config and tokenizer to take; None takes those kept in the checkpoint.
        dtype: of the output; None keeps the checkpoint's.

    Raises:
        UserError: damaged or foreign checkpoint, or an output that is in use. Nothing is left behind.
    """
    actor = checkpoint if (checkpoint / ".metadata").is_file() else checkpoint / "actor"
    if not (actor / ".metadata").is_file():
        raise UserError(f"--checkpoint {checkpoint}: no checkpoint there; give a folder …/global_step_N/actor")
    verify_checkpoint(actor.parent)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not empty; give a new folder")
    source = hf_model or actor / HF_FOLDER
    if not (source / "config.json").is_file():
        raise UserError(f"--hf-model {source}: has no config.json; give the folder of the base model")
    metadata = FileSystemReader(actor).read_metadata()
    stored = {
        key.removeprefix("model."): item
        for key, item in metadata.state_dict_metadata.items()
        if key.startswith("model.") and isinstance(item, TensorStorageMetadata)
    }
    shapes = {name: tuple(item.size) for name, item in stored.items()}
    check_names(shapes, expected_shapes(source))
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with Progress() as progress:
            task = progress.add_task("converting", total=len(stored))

            def read() -> Iterator[tuple[str, Tensor]]:
                for name, item in stored.items():
                    tensor = torch.empty(item.size, dtype=item.properties.dtype)
                    dcp.load({"model": {name: tensor}}, checkpoint_id=actor, no_dist=True)
                    progress.advance(task)
                    yield name, tensor if dtype is None else tensor.to(dtype)

            written = write_weights(read(), partial)
        copy_hf_files(source, partial, dtype)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot write: {error}; nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return written


def expected_shapes(model_folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the architecture's parameters; a tied output layer is left out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    model.tie_weights()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_names(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse what does not fit the architecture.

    Raises:
        UserError: missing, extra or misshapen tensors, by name.
    """
    tied = {"lm_head.weight"} - expected.keys()
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys() - tied]
    problems += [
        f"{name} is {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise UserError(f"the checkpoint does not fit the model's config.json ({len(problems)} tensors): {shown}")


def write_weights(named: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write tensors as safetensors, in several files with an index if they are large. Returns their number."""
    shards: list[list[str]] = []
    current: dict[str, Tensor] = {}
    size = total = count = 0

    def flush() -> None:
        nonlocal current, size
        save_file(current, str(folder / f"shard-{len(shards)}.safetensors"), metadata={"format": "pt"})
        shards.append(list(current))
        current, size = {}, 0

    for name, tensor in named:
        nbytes = tensor.numel() * tensor.element_size()
        if current and size + nbytes > shard_bytes:
            flush()
        current[name] = tensor.contiguous()
        size += nbytes
        total += nbytes
        count += 1
    flush()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return count
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return count


def copy_hf_files(source: Path, output: Path, dtype: torch.dtype | None) -> None:
    """Configuration, generation configuration, tokenizer and chat template."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and "safetensors" not in path.name:
            shutil.copy(path, output / path.name)
    if dtype is not None:
        config: dict[str, Any] = json.loads((output / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    parser = argparse.ArgumentParser(prog="searchr1 convert", description="Convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    fsdp = commands.add_parser("fsdp2hf", help="FSDP training checkpoint -> Hugging Face folder")
    fsdp.add_argument("--checkpoint", type=Path, required=True, help="…/checkpoints/global_step_N/actor")
    fsdp.add_argument("--output", type=Path, required=True, help="new folder")
    fsdp.add_argument("--hf-model", type=Path, help="base model, for config and tokenizer (default: the checkpoint's own)")
    fsdp.add_argument("--dtype", choices=sorted(DTYPES), help="precision of the output (default: as trained)")
    args = parser.parse_args(argv)
    count = convert(args.checkpoint, args.output, args.hf_model, DTYPES[args.dtype] if args.dtype else None)
    print(f"{count} tensors -> {args.output}")
    return 0
