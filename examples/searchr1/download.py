"""Downloads what the 8-GPU recipe searches: corpus, pages, encoder, and on request a ready-made index.

    python download.py --save_path /data/wiki                     corpus, pages and encoder
    python download.py --save_path /data/wiki --what wiki18        Search-R1's corpus with its e5 index, joined and unpacked

Files come from the Hugging Face hub (HF_ENDPOINT names a mirror); an interrupted download goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from searchr1.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True)
class Item:
    """One file of a repository, or (file None) the whole of it."""

    repo: str
    repo_type: str
    file: str | None
    gib: float
    """About how large it is."""
    folder: str = "."


CORPUS = [
    Item("inclusionAI/ASearcher-Local-Knowledge", "dataset", "wiki_corpus.jsonl", 15),
    Item("inclusionAI/ASearcher-Local-Knowledge", "dataset", "wiki_webpages.jsonl", 40),
]
WIKI18 = [
    Item("PeterJinGo/wiki-18-corpus", "dataset", "wiki-18.jsonl.gz", 5),
    Item("PeterJinGo/wiki-18-e5-index", "dataset", "part_aa", 40),
    Item("PeterJinGo/wiki-18-e5-index", "dataset", "part_ab", 22),
]
ENCODER = [Item("intfloat/e5-base-v2", "model", None, 1, "e5-base-v2")]
SETS = {"asearcher": CORPUS + ENCODER, "wiki18": WIKI18 + ENCODER}
EXTRA_GIB = {"asearcher": 0.0, "wiki18": 62.0 + 14.0}
"""Needed on top for what is joined and unpacked here."""
MADE_HERE = {"asearcher": [], "wiki18": ["wiki-18.jsonl", "e5.index/e5_Flat.index"]}

Fetch = Callable[[Item, Path], Path]


def fetch_from_hub(item: Item, save_path: Path) -> Path:
    """Download one item; returns the file or folder."""
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError as error:
        raise UserError("huggingface_hub is not installed; run: pip install huggingface_hub") from error

    target = save_path / item.folder
    if item.file is not None:
        return Path(hf_hub_download(item.repo, item.file, repo_type=item.repo_type, local_dir=target))
    # The same weights in other formats are left out.
    other_formats = ["onnx/*", "openvino/*", "*.bin", "*.h5", "*.msgpack", "*.ot"]
    return Path(snapshot_download(item.repo, repo_type=item.repo_type, local_dir=target, ignore_patterns=other_formats))


def bytes_present(what: str, save_path: Path) -> int:
    """What earlier runs have left of a set, finished or not."""
    names = [item.file or item.folder for item in SETS[what]] + MADE_HERE[what] + [".cache/huggingface"]
    files = [file for name in names for file in [save_path / name, *(save_path / name).rglob("*")] if file.is_file()]
    return sum(file.stat().st_size for file in files)


def check_space(what: str, save_path: Path) -> None:
    """Say how much space is needed.

    Raises:
        UserError: there is not enough; what is there already counts as done.
    """
    whole = sum(item.gib for item in SETS[what]) + EXTRA_GIB[what]
    missing = max(whole - bytes_present(what, save_path) / GIB, 0)
    free = shutil.disk_usage(save_path).free / GIB
    print(f"{what}: about {whole:.0f} GiB in {save_path}, {missing:.0f} GiB of it missing; {free:.0f} GiB free", flush=True)
    if free < missing:
        raise UserError(f"--save_path {save_path}: {free:.0f} GiB free, about {missing:.0f} GiB more needed")


def download(what: str, save_path: Path, fetch: Fetch = fetch_from_hub) -> list[Path]:
    """Fetch a set, then join and unpack. Returns what is there afterwards.

    Raises:
        UserError: not enough space, or the hub cannot be reached.
    """
    save_path.mkdir(parents=True, exist_ok=True)
    check_space(what, save_path)
    found = []
    for number, item in enumerate(SETS[what], start=1):
        print(f"[{number}/{len(SETS[what])}] {item.repo} {item.file or ''}", flush=True)
        try:
            found.append(fetch(item, save_path))
        except (OSError, ValueError, RuntimeError) as error:  # what huggingface_hub raises, by version
            raise UserError(
                f"cannot download {item.repo}: {error}; check the connection (HF_ENDPOINT names a mirror) and run this "
                "again: finished files are kept"
            ) from error
    check_encoder(save_path / ENCODER[0].folder)
    if what == "wiki18":
        try:
            found.append(unpack(save_path / "wiki-18.jsonl.gz"))
            found.append(join([save_path / "part_aa", save_path / "part_ab"], save_path / "e5.index/e5_Flat.index"))
        except (OSError, EOFError) as error:
            raise UserError(
                f"cannot unpack or join: {error}; delete the file that it names, or make room, and run again"
            ) from error
    return found


def check_encoder(folder: Path) -> None:
    """The hub library answers with whatever is in the folder when it cannot reach the hub.

    Raises:
        UserError: the encoder is not complete.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: not complete (config.json or *.safetensors is missing); check the connection and run again"
        )


def unpack(archive: Path) -> Path:
    """Unpack a .gz beside itself, unless that was done."""
    output = archive.with_suffix("")
    if not output.exists():
        partial = output.with_suffix(".partial")
        with gzip.open(archive) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 16 << 20)
        partial.rename(output)
    return output


def join(parts: list[Path], output: Path) -> Path:
    """Put the parts of a file together, unless that was done."""
    size = sum(part.stat().st_size for part in parts)
    if not output.exists() or output.stat().st_size != size:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        with partial.open("wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target, 16 << 20)
        partial.rename(output)
    return output


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_path", type=Path, required=True)
    parser.add_argument("--what", choices=sorted(SETS), default="asearcher")
    args = parser.parse_args()
    try:
        for path in download(args.what, args.save_path):
            print(path)
    except UserError as error:
        print(f"download.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
