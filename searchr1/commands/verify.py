"""`searchr1 verify`: whether checkpoints, models, indexes and corpora are still what was written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from searchr1.checkpoints.manifest import (
    MANIFEST,
    SIZES,
    bytes_to_read,
    changed_files,
    is_complete,
    is_run_checkpoint,
    read_contents,
)
from searchr1.checkpoints.model_folder import MODEL_SUMS, changed_model_files, read_model_sums
from searchr1.checkpoints.structure import check_distributed, check_model, check_ranks, named
from searchr1.errors import UserError
from searchr1.files.checksums import Damage, files_below
from searchr1.progress import Advance, ProgressBar

BAR_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to verify."""

    path: Path
    kind: str
    by: str
    """What its bytes are compared with."""
    total_bytes: int
    """How many bytes are read; for the progress bar."""
    run: Callable[[Advance], Iterator[Damage]]


@dataclass(frozen=True, slots=True)
class Result:
    """A check and the damage that it found."""

    check: Check
    damaged: list[Damage]

    def line(self) -> str:
        """Return the result as a line of text."""
        state = f"{len(self.damaged)} damaged" if self.damaged else "intact"
        return f"{self.check.path}: {state} ({self.check.kind}, {decimal(self.check.total_bytes)}, by {self.check.by})"

    def row(self) -> dict[str, object]:
        """Return the result as a JSON object."""
        return {
            "path": str(self.check.path),
            "kind": self.check.kind,
            "by": self.check.by,
            "bytes": self.check.total_bytes,
            "damaged": [{"path": str(each.path), "problem": each.problem} for each in self.damaged],
        }


def checks_of(path: Path) -> list[Check]:
    """Return what is to be verified of a path that the user gave.

    Raises:
        UserError: it is nothing that can be verified.
    """
    if path.is_file():
        return [_rows(path)]
    if not path.is_dir():
        raise UserError(f"{path}: does not exist; give a checkpoint, a run, a model, an index or a corpus")
    for recognise in (_checkpoint, _run, _part, _model, _index, _weights):
        found = recognise(path)
        if found:
            return found
    raise UserError(
        f"{path}: is no folder that can be verified; give a checkpoint (global_step_N), a run, a model folder, an index, or "
        "the file of a corpus"
    )


def _checkpoint(folder: Path, below: str = "") -> list[Check]:
    if not is_run_checkpoint(folder):
        return []
    try:
        contents = read_contents(folder)
    except UserError as error:
        problem = named(folder, error)
        return [Check(folder, "checkpoint", "checksums", 0, lambda _: iter([problem]))]
    by = "checksums" if contents.has_sums else f"sizes; it was written before there were checksums, its {SIZES} has none"
    total = bytes_to_read(contents, below)
    return [Check(folder / below, "checkpoint", by, total, lambda advance: changed_files(folder, contents, below, advance))]


def _run(folder: Path) -> list[Check]:
    root = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    return [check for each in sorted(root.iterdir(), key=_number) if is_complete(each) for check in _checkpoint(each)]


def _number(folder: Path) -> tuple[str, int]:
    name, _, number = folder.name.rpartition("_")
    return (name, int(number)) if number.isdecimal() else (folder.name, 0)


def _part(folder: Path) -> list[Check]:
    for place in (folder, folder.resolve()):
        if place.name not in ("", "..") and is_run_checkpoint(place.parent):
            return _checkpoint(place.parent, place.name)
    return []


def _index(folder: Path) -> list[Check]:
    if not (folder / MANIFEST).is_file() and not any(folder.glob("*.index")):
        return []
    from searchr1.retrieval.index.verify import check_index, checked_by

    return [Check(folder, "index", checked_by(folder), _size(folder), lambda advance: check_index(folder, advance))]


def _model(folder: Path) -> list[Check]:
    has_config = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    if not has_config or not any(any(folder.glob(f"*{ending}")) for ending in (".safetensors", ".index.json", ".bin")):
        return []
    return [_with_sums(folder, "model", "headers and sizes; it has no checksums", check_model)]


def _weights(folder: Path) -> list[Check]:
    """Recognise checkpoints that are not of a run: what hf2mg wrote, and other trainers'."""
    from searchr1.checkpoints.locate import locate

    try:
        located = locate(folder)
    except UserError:
        return []
    check = check_distributed if located.kind == "distributed" else check_ranks
    return [_with_sums(located.folder, "weights", "PyTorch's checksums of each part", check)]


def _with_sums(folder: Path, kind: str, by: str, check: Callable[[Path, Advance], Iterator[Damage]]) -> Check:
    """Return a check by the sums in the folder where it has them; else as far as the files themselves allow."""
    if (folder / MODEL_SUMS).is_file():
        try:
            total = sum(known.bytes for known in (read_model_sums(folder) or {}).values())
        except (OSError, ValueError):
            total = 0  # which the check reports
        return Check(folder, kind, "checksums", total, lambda advance: changed_model_files(folder, advance))
    return Check(folder, kind, by, _size(folder), lambda advance: check(folder, advance))


def _rows(path: Path) -> Check:
    from searchr1.retrieval.index.unpack import ENDINGS

    if not path.name.endswith(ENDINGS):
        raise UserError(f"{path}: is no corpus ({', '.join(ENDINGS)}); give the folder that the file belongs to")
    from searchr1.retrieval.index.verify import bytes_of_rows, check_rows

    return Check(
        path, "corpus", "what its first reader noted", bytes_of_rows(path), lambda advance: check_rows(path, advance)
    )


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in files_below(folder) if (folder / name).is_file())


def _run_check(check: Check) -> Result:
    with ProgressBar(f"verifying {check.path.name}", check.total_bytes, least=BAR_BYTES) as bar:
        return Result(check, list(check.run(bar.advance)))


def main(argv: list[str]) -> int:
    """Verify what is given. Return 0 if it is intact, 1 if something is damaged, 2 if something cannot be verified."""
    parser = argparse.ArgumentParser(
        prog="searchr1 verify", description="Compare checkpoints, models, indexes and corpora with what was written."
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="a checkpoint, a run (all its checkpoints), a model, an index, a corpus",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = parser.parse_args(argv)
    results: list[Result] = []
    refused: list[dict[str, str]] = []
    for path in args.paths:
        try:
            for check in checks_of(path):
                results.append(_run_check(check))
                if not args.json:
                    print("\n".join([*map(str, results[-1].damaged), results[-1].line()]), flush=True)
        except UserError as error:
            refused.append({"path": str(path), "reason": str(error)})
            print(f"searchr1 verify: {error}", file=sys.stderr, flush=True)
    code = 2 if refused else int(any(result.damaged for result in results))
    if args.json:
        print(
            json.dumps({"intact": code == 0, "results": [result.row() for result in results], "refused": refused}, indent=1)
        )
    return code
