"""`searchr1 sft`: supervised fine-tuning with loss masks, packed, on one process or many (torchrun).

Rows (files of docs/guides/data.md, or data sets of the hub), one of
    {"messages": [{"role", "content"}, …]}              loss on the assistant's messages; also ShareGPT's conversations
    {"prompt": str, "response": str}                    loss on the response
    {"segments": [{"text": str, "train": bool}, …]}     loss where `train`; segments are tokenized one by one, as the agent
                                                        loop does with what the policy writes and what tools answer

Several ranks: torchrun --nproc-per-node 8 -m searchr1.cli sft --backend megatron --tensor-parallel 2 …
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

from searchr1.checkpoints.hf_writer import DTYPES
from searchr1.data.model_source import require_source
from searchr1.errors import UserError
from searchr1.files.folder_lock import folder_lock, is_lock
from searchr1.training.sft import SftConfig, train


def main(argv: list[str]) -> int:
    """Run the sub-command. Return its exit code."""
    config = parse(argv)
    lead = os.environ.get("RANK", "0") == "0"
    with folder_lock(config.output, "--output", "searchr1 sft") if lead else nullcontext():
        _make_output(config.output)
        train(config)
    return 0


def parse(argv: list[str]) -> SftConfig:
    """Read the command line.

    Raises:
        UserError: flags that exclude each other, or an output that is in use.
    """
    parser = argparse.ArgumentParser(
        prog="searchr1 sft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", help="Hugging Face folder or hub name to start from")
    start.add_argument("--fresh", help="folder with a config.json: start from random weights")
    parser.add_argument("--tokenizer", help="folder of the tokenizer (default: the model's)")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of rows, or data sets of the hub")
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, help="instead of --epochs")
    parser.add_argument("--tokens-per-batch", type=int, default=16384, help="tokens of an optimizer step")
    parser.add_argument("--max-tokens-per-mbs", type=int, default=8192, help="tokens of a packed micro-batch")
    parser.add_argument(
        "--max-length", type=int, help="longer rows are left out and counted (default 4096, or the model's positions)"
    )
    parser.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up")
    parser.add_argument("--schedule", choices=("constant", "linear", "cosine"), default="cosine")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--adam-eps", type=float, default=1e-8, help="added to the root of the second moment")
    parser.add_argument("--backend", choices=("fsdp", "megatron"), default="fsdp", help="FSDP2 or Megatron-Core")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share each layer (megatron)")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="ranks that share the layers (megatron)")
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank (fsdp); the output is merged")
    parser.add_argument("--lora-alpha", type=float, default=32.0, help="the adapters' update is scaled by alpha / rank")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the arithmetic")
    parser.add_argument("--save-dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.fresh and not args.tokenizer:
        raise UserError("--fresh needs --tokenizer")
    if args.fresh and args.lora_rank:
        raise UserError("--lora-rank: random weights are not worth freezing; leave it out, or start from --model")
    if min(args.tensor_parallel, args.pipeline_parallel) < 1 or args.lora_rank < 0 or args.lora_alpha <= 0:
        raise UserError("--tensor-parallel, --pipeline-parallel and --lora-alpha must be more than 0, --lora-rank 0 or more")
    for flag in ("model", "fresh"):
        if getattr(args, flag) is not None:
            require_source(getattr(args, flag), f"--{flag}")
    _make_output(args.output)
    return SftConfig(**vars(args))


def _make_output(output: Path) -> None:
    """Make the folder now: a place that cannot be written to is not discovered when the training is done.

    Raises:
        UserError: it is in use, a file, or not writable.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        in_use = any(not is_lock(path.name) for path in output.iterdir())
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made ({error.strerror}); give a new folder") from error
    if in_use:
        raise UserError(f"--output {output}: exists and is not empty; give a new folder")
    if not os.access(output, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: is not writable; give another folder")
