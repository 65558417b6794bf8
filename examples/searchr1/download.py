"""Downloads what the recipes search: corpus, pages, encoder, and on request a ready-made index.

    python download.py --save_path /data/wiki                       ASearcher's corpus and pages, and the encoder
    python download.py --save_path /data/wiki --what wiki18          Search-R1's corpus and e5 index, joined, unpacked
    python download.py --save_path /data/wiki --what wiki18-corpus   the corpus alone, for an index of your own
    python download.py --save_path /data/wiki --what encoder         intfloat/e5-base-v2

Files come from the Hugging Face hub (HF_ENDPOINT names a mirror). An interrupted download goes on where it stopped. The size
of every file is checked; --verify checks hashes too, --repair fetches again what is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from searchr1.errors import UserError
from searchr1.progress import ProgressBar
from searchr1.retrieval.index.unpack import unpack as write_rows
from searchr1.streams import open_streams

GIB = 1 << 30
BLOCK = 16 << 20
OTHER_FORMATS = (".bin", ".h5", ".msgpack", ".ot", ".onnx", ".xml", ".gguf")
"""The same weights once more."""


@dataclass(frozen=True)
class Item:
    """One file of a repository, or (file None) all that is needed of it."""

    repo: str
    repo_type: str
    file: str | None
    folder: str = "."


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub describes it."""

    item: Item
    name: str
    size: int
    sha256: str | None

    def at(self, save_path: Path) -> Path:
        """Where it is kept here."""
        return save_path / self.item.folder / self.name


ASEARCHER = "inclusionAI/ASearcher-Local-Knowledge"
ENCODER = [Item("intfloat/e5-base-v2", "model", None, "e5-base-v2")]
CORPUS18 = [Item("PeterJinGo/wiki-18-corpus", "dataset", "wiki-18.jsonl.gz")]
PARTS18 = [Item("PeterJinGo/wiki-18-e5-index", "dataset", name) for name in ("part_aa", "part_ab")]
SETS = {
    "asearcher": [
        Item(ASEARCHER, "dataset", "wiki_corpus.jsonl"),
        Item(ASEARCHER, "dataset", "wiki_webpages.jsonl"),
        *ENCODER,
    ],
    "wiki18": [*CORPUS18, *PARTS18, *ENCODER],
    "wiki18-corpus": CORPUS18,
    "encoder": ENCODER,
}
INDEX = "e5.index/e5_Flat.index"
UNPACKED_SHARE = 2.8
"""Bytes of wiki-18.jsonl for each of its archive's."""


class Hub:
    """The Hugging Face hub."""

    def __init__(self) -> None:
        try:
            import huggingface_hub
        except ImportError as error:
            raise UserError("huggingface_hub is not installed; run: pip install huggingface_hub") from error
        self._hub = huggingface_hub

    def files(self, item: Item) -> list[RemoteFile]:
        """What there is to fetch.

        Raises:
            UserError: the hub does not answer, or has no such file.
        """
        try:
            info = self._hub.HfApi().repo_info(item.repo, repo_type=item.repo_type, files_metadata=True, timeout=30)
        except Exception as error:  # what the library raises differs by version
            raise unreachable(item, error) from error
        found = []
        for entry in info.siblings or []:
            wanted = entry.rfilename == item.file if item.file else not entry.rfilename.endswith(OTHER_FORMATS)
            if wanted and "/" not in entry.rfilename.removeprefix("1_Pooling/"):
                lfs = entry.lfs.sha256 if entry.lfs else None
                found.append(RemoteFile(item, entry.rfilename, int(entry.size or 0), lfs))
        if not found:
            raise UserError(f"{item.repo} has no {item.file or 'files'}; it may have been renamed on the hub")
        return found

    def fetch(self, file: RemoteFile, save_path: Path, force: bool = False) -> None:
        """Download one file, or the rest of it.

        Raises:
            UserError: the connection was lost, or the disk is full.
        """
        item = file.item
        try:
            self._hub.hf_hub_download(
                item.repo, file.name, repo_type=item.repo_type, local_dir=save_path / item.folder, force_download=force
            )
        except Exception as error:  # what the library raises differs by version
            raise unreachable(item, error) from error


def unreachable(item: Item, error: Exception) -> UserError:
    """What to do about a download that failed."""
    return UserError(
        f"cannot download {item.repo}: {error}; check the connection and the free space (HF_ENDPOINT names a mirror) and "
        "run this again: finished files are kept"
    )


def is_joined(save_path: Path, files: list[RemoteFile]) -> bool:
    """Whether the index has been made of its parts."""
    parts = [file for file in files if file.item in PARTS18]
    index = save_path / INDEX
    return bool(parts) and index.is_file() and index.stat().st_size == sum(part.size for part in parts)


def is_moved(save_path: Path, file: RemoteFile) -> bool:
    """Whether the first part is already growing into the index."""
    return file.item == PARTS18[0] and partial_index(save_path).is_file()


def partial_index(save_path: Path) -> Path:
    """The index while it grows."""
    return (save_path / INDEX).with_suffix(".partial")


def missing(files: list[RemoteFile], save_path: Path) -> list[RemoteFile]:
    """Files that have to be fetched."""
    joined = is_joined(save_path, files)
    found = []
    for file in files:
        done = (joined and file.item in PARTS18) or is_moved(save_path, file)
        here = file.at(save_path)
        if not done and not (here.is_file() and here.stat().st_size == file.size):
            found.append(file)
    return found


def check_space(what: str, files: list[RemoteFile], save_path: Path, keep_parts: bool) -> None:
    """Say how much space is needed.

    Raises:
        UserError: there is not enough.
    """
    needed = sum(file.size for file in missing(files, save_path))
    started = sum(part.stat().st_size for part in (save_path / ".cache").rglob("*.incomplete"))
    needed = max(needed - started, 0)
    archive = next((file for file in files if file.item == CORPUS18[0]), None)
    if archive and not (save_path / "wiki-18.jsonl").exists():
        needed += int(archive.size * UNPACKED_SHARE)
    if keep_parts and not is_joined(save_path, files):
        needed += sum(file.size for file in files if file.item in PARTS18)
    free = shutil.disk_usage(save_path).free
    whole = sum(file.size for file in files)
    print(
        f"{what}: {len(files)} files, {whole / GIB:.1f} GiB; {needed / GIB:.1f} GiB more are needed in {save_path}, "
        f"{free / GIB:.1f} GiB are free",
        flush=True,
    )
    if free < needed:
        raise UserError(f"--save_path {save_path}: {free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB needed")


def wrong(file: RemoteFile, save_path: Path, verify: bool) -> str | None:
    """What is wrong with a file that was fetched; None if nothing is."""
    here = file.at(save_path)
    size = here.stat().st_size if here.is_file() else 0
    if size != file.size:
        return f"{here}: has {size} bytes, {file.size} on the hub"
    if verify and file.sha256 and hash_of(here, 0, size) != file.sha256:
        return f"{here}: its SHA-256 is not the hub's"
    return None


def hash_of(path: Path, start: int, size: int) -> str:
    """SHA-256 of a stretch of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file, ProgressBar(f"checking {path.name}", size) as bar:
        file.seek(start)
        while size > 0 and (block := file.read(min(BLOCK, size))):
            digest.update(block)
            size -= len(block)
            bar.advance(len(block))
    return digest.hexdigest()


def download(
    what: str, save_path: Path, hub: Hub, *, verify: bool = False, repair: bool = False, keep_parts: bool = False
) -> list[Path]:
    """Fetch a set, check it, then join and unpack. Returns what is there afterwards.

    Raises:
        UserError: not enough space, the hub cannot be reached, or a file is wrong.
    """
    save_path.mkdir(parents=True, exist_ok=True)
    files = [file for item in SETS[what] for file in hub.files(item)]
    check_space(what, files, save_path, keep_parts)
    todo = missing(files, save_path)
    for number, file in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {file.item.repo} {file.name}, {file.size / GIB:.2f} GiB", flush=True)
        hub.fetch(file, save_path)
    joined = is_joined(save_path, files)
    for file in files:
        if (joined and file.item in PARTS18) or is_moved(save_path, file):
            continue
        problem = wrong(file, save_path, verify)
        if problem and repair:
            print(f"{problem}; fetching it again", flush=True)
            hub.fetch(file, save_path, force=True)
            problem = wrong(file, save_path, verify)
        if problem:
            raise UserError(f"{problem}; run again with --repair to fetch it again")
    found = [file.at(save_path) for file in files if file.item.file and file.item not in PARTS18]
    found += [save_path / item.folder for item in SETS[what] if item.file is None]
    if any(item in SETS[what] for item in CORPUS18):
        found.append(unpack(save_path / "wiki-18.jsonl.gz"))
    parts = [file for file in files if file.item in PARTS18]
    if parts:
        found.append(join(parts, save_path, keep_parts))
        if verify:
            verify_joined(parts, found[-1])
    return found


def unpack(archive: Path) -> Path:
    """Write the rows of the corpus beside its archive (a gzipped tar), unless they are of the same archive.

    Raises:
        UserError: damaged archive, or the disk is full.
    """
    try:
        return write_rows(archive, archive.with_suffix(""), "--save_path")
    except UserError as error:
        raise UserError(f"{error}; make room, or run again with --repair --verify") from error


def join(parts: list[RemoteFile], save_path: Path, keep_parts: bool) -> Path:
    """Make one file of the parts, unless that was done.

    The first part is moved to the place of the whole and the second appended to it, so no second copy is needed; what was
    appended before a kill is not appended again.

    Raises:
        UserError: the disk is full.
    """
    first, second = parts
    output, partial = save_path / INDEX, partial_index(save_path)
    total = first.size + second.size
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not (output.is_file() and output.stat().st_size == total):
            if not partial.is_file():
                if keep_parts:
                    copying = partial.with_suffix(".copying")
                    shutil.copyfile(first.at(save_path), copying)
                    os.replace(copying, partial)
                else:
                    os.replace(first.at(save_path), partial)
            with (
                partial.open("ab") as target,
                second.at(save_path).open("rb") as source,
                ProgressBar("joining", total) as bar,
            ):
                source.seek(max(partial.stat().st_size - first.size, 0))
                bar.update(partial.stat().st_size)
                while block := source.read(BLOCK):
                    target.write(block)
                    bar.advance(len(block))
                target.flush()
                os.fsync(target.fileno())
            os.replace(partial, output)
    except OSError as error:
        raise UserError(f"{output}: cannot join the parts ({error}); make room and run this again") from error
    if not keep_parts:
        for part in parts:
            part.at(save_path).unlink(missing_ok=True)
    return output


def verify_joined(parts: list[RemoteFile], index: Path) -> None:
    """Compare the index with the hashes of its parts.

    Raises:
        UserError: it differs.
    """
    start = 0
    for part in parts:
        if part.sha256 and hash_of(index, start, part.size) != part.sha256:
            raise UserError(f"{index}: the part that came from {part.name} is damaged; delete the file and run this again")
        start += part.size


def main() -> int:
    """Entry point."""
    open_streams(for_children=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_path", type=Path, required=True)
    parser.add_argument("--what", choices=sorted(SETS), default="asearcher")
    parser.add_argument("--verify", action="store_true", help="check SHA-256 sums too (reads everything once)")
    parser.add_argument("--repair", action="store_true", help="fetch again what is wrong")
    parser.add_argument("--keep_parts", action="store_true", help="keep the parts of the index (needs the space twice)")
    args = parser.parse_args()
    try:
        options = {"verify": args.verify, "repair": args.repair, "keep_parts": args.keep_parts}
        for path in download(args.what, args.save_path, Hub(), **options):
            print(path)
        if args.what == "wiki18-corpus":
            print("next: searchr1 build-index --retriever_name bm25 --corpus_path", args.save_path / "wiki-18.jsonl")
    except UserError as error:
        print(f"download.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
