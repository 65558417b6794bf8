"""`searchr1 build-index`: a BM25 or dense index of a corpus."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from pathlib import Path

from searchr1.errors import UserError
from searchr1.retrieval.encode.encoder import FAMILIES
from searchr1.retrieval.index.build import BuildOptions, build_index
from searchr1.retrieval.index.faiss_types import NAMES
from searchr1.retrieval.index.tokens import TOKENIZERS

ONLY_BM25 = {"stemmer", "tokenizer"}
BM25_FLAGS = ONLY_BM25 | {"corpus_path", "save_dir", "retriever_name", "overwrite"}


def parse(argv: list[str]) -> BuildOptions:
    """Parse and check the flags; those of Search-R1's index builder are read too.

    Raises:
        UserError: flags that do not go together.
    """
    parser = argparse.ArgumentParser(prog="searchr1 build-index", description="Build an index of a corpus.")
    parser.add_argument(
        "--corpus_path",
        type=Path,
        required=True,
        help="jsonl, jsonl.gz (also a tar archive, as wiki-18.jsonl.gz is) or parquet",
    )
    parser.add_argument("--save_dir", type=Path, required=True, help="folder to write the index to")
    parser.add_argument("--retriever_name", "--retrieval_method", choices=["bm25", *FAMILIES])
    parser.add_argument(
        "--retriever_model", "--model_path", help="folder of the encoder, or its name on the Hugging Face hub"
    )
    parser.add_argument("--faiss_type", help=f"{', '.join(NAMES)}, or a FAISS factory string")
    parser.add_argument("--max_length", type=int, help="tokens of a passage (default 256)")
    parser.add_argument("--pooling_method", help="mean, cls, pooler or decoder, in place of the family's")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the encoder (fp16 on a GPU, else fp32)")
    parser.add_argument("--use_fp16", dest="dtype", action="store_const", const="fp16", help="the same as --dtype fp16")
    parser.add_argument("--batch_size", type=int, help="passages of full length that are encoded together")
    parser.add_argument("--device", help="cpu or cuda, for the encoder")
    parser.add_argument("--devices", help="one process each, for instance cuda:0,cuda:1")
    parser.add_argument("--processes", type=int, help="processes that share --device")
    parser.add_argument(
        "--save_embedding", action="store_true",
        help="keep the vectors too, in emb_NAME.memmap: passages x dimension, fp32",
    )  # fmt: skip
    parser.add_argument("--embedding_path", type=Path, help="take the vectors from such a file, do not encode")
    parser.add_argument("--faiss_gpu", action="store_true", help="read, but without effect: the index is made on the CPU")
    parser.add_argument("--stemmer", help="bm25: reduce words to their stems, for instance --stemmer english")
    parser.add_argument(
        "--tokenizer", choices=["auto", *TOKENIZERS],
        help="bm25: words, or multilingual for scripts without spaces (default auto: by the corpus)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="of the sample that an index is trained on")
    parser.add_argument("--overwrite", action="store_true", help="replace an index, or start an unfinished one anew")
    parser.set_defaults(**{field.name: field.default for field in fields(BuildOptions) if field.default is not MISSING})
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.retriever_name == "bm25":
        unused = sorted(given - BM25_FLAGS)
        if unused:
            print(f"bm25 makes no use of {', '.join(f'--{name}' for name in unused)}", flush=True)
    else:
        check_dense(args, given)
    if min(args.processes, args.max_length, args.batch_size) < 1:
        raise UserError("--processes, --max_length and --batch_size must be at least 1")
    if args.devices and args.processes > 1:
        raise UserError(f"--processes {args.processes}: --devices gives one process for each; leave one of them out")
    return BuildOptions(**vars(args))


def check_dense(args: argparse.Namespace, given: set[str]) -> None:
    """Check the flags of a dense index.

    Raises:
        UserError: one is missing, is BM25's, or would destroy what another one names.
    """
    if args.retriever_model is None:
        raise UserError(f"--retriever_name {args.retriever_name} needs --retriever_model")
    if wrong := sorted(given & ONLY_BM25):
        raise UserError(f"--{wrong[0]}: is for --retriever_name bm25 only; leave it out")
    if args.faiss_gpu:
        print("--faiss_gpu: the index is made on the CPU, the file is the same; --device cuda encodes on a GPU", flush=True)
    if args.embedding_path and args.overwrite and args.embedding_path.resolve().parent == args.save_dir.resolve():
        raise UserError(f"--embedding_path {args.embedding_path}: --overwrite might remove it; move it out of --save_dir")
    if args.embedding_path and args.save_embedding:
        raise UserError("--save_embedding: the vectors are in --embedding_path already; leave it out")


def main(argv: list[str]) -> int:
    """Run the sub-command. Return its exit code."""
    build_index(parse(argv))
    return 0
