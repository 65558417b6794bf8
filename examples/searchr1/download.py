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
"""Needed on top while parts are joined and archives unpacked."""

Fetch = Callable[[Item, Path], Path]


def fetch_from_hub(item: Item, save_path: Path) -> Path:
    """Download one item; returns the file or folder."""
    from huggingface_hub import hf_hub_download, snapshot_download

    target = save_path / item.folder
    if item.file is None:
        return Path(snapshot_download(item.repo, repo_type=item.repo_type, local_dir=target))
    return Path(hf_hub_download(item.repo, item.file, repo_type=item.repo_type, local_dir=target))


def download(what: str, save_path: Path, fetch: Fetch = fetch_from_hub) -> list[Path]:
    """Fetch a set, then join and unpack. Returns what is there afterwards.

    Raises:
        UserError: not enough space, or the hub cannot be reached.
    """
    save_path.mkdir(parents=True, exist_ok=True)
    needed = sum(item.gib for item in SETS[what]) + EXTRA_GIB[what]
    free = shutil.disk_usage(save_path).free / GIB
    print(f"{what}: about {needed:.0f} GiB needed in {save_path}, {free:.0f} GiB free", flush=True)
    if free < needed:
        raise UserError(f"--save_path {save_path}: {free:.0f} GiB free, about {needed:.0f} GiB needed")
    found = []
    for number, item in enumerate(SETS[what], start=1):
        print(f"[{number}/{len(SETS[what])}] {item.repo} {item.file or ''}", flush=True)
        try:
            found.append(fetch(item, save_path))
        except OSError as error:
            raise UserError(
                f"cannot download {item.repo}: {error}; check the connection (HF_ENDPOINT names a mirror) and run this "
                "again: finished files are kept"
            ) from error
    if what == "wiki18":
        found.append(unpack(save_path / "wiki-18.jsonl.gz"))
        found.append(join([save_path / "part_aa", save_path / "part_ab"], save_path / "e5.index/e5_Flat.index"))
    return found


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
