"""`checksums.json`: what a conversion wrote, beside it, so that a model's changed bytes are noticed before it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from searchr1.checksums import Damage, FileSum, damaged, take_all
from searchr1.convert.progress import progress_bar
from searchr1.errors import UserError
from searchr1.sums_file import LaterFormat, read_sums, write_sums

MODEL_SUMS = "checksums.json"
WEIGHTS = (".safetensors", ".distcp", ".metadata", ".pt")
"""Files that nobody edits. Configurations and chat templates are: loading a model does not mind, `searchr1 verify` does."""
BAR_BYTES = 1 << 30


def write_model_sums(folder: Path) -> None:
    """Write the sums of all files below a folder that is complete but for them.

    Raises:
        OSError: a file cannot be read, or the sums not be written.
    """
    (folder / MODEL_SUMS).unlink(missing_ok=True)
    write_sums(folder / MODEL_SUMS, take_all(folder))


def read_model_sums(folder: Path, weights_only: bool = False) -> dict[str, FileSum] | None:
    """Return the sums that lie in a model folder; None if there are none.

    Raises:
        ValueError: they are damaged; says how, as a predicate.
        OSError: they cannot be read.
    """
    if not (folder / MODEL_SUMS).is_file():
        return None
    files = read_sums(folder / MODEL_SUMS).files
    return {name: known for name, known in files.items() if not weights_only or name.endswith(WEIGHTS)}


def changed_model_files(
    folder: Path, advance: Callable[[int], object] | None = None, weights_only: bool = False
) -> Iterator[Damage]:
    """Yield the files of a model folder that are not what its sums say; none if it has no sums."""
    try:
        sums = read_model_sums(folder, weights_only)
    except ValueError as error:
        yield Damage(folder / MODEL_SUMS, str(error))
    except OSError as error:
        yield Damage(folder / MODEL_SUMS, f"cannot be read ({error.strerror})")
    else:
        yield from damaged(folder, sums or {}, advance=advance)


def verify_weights(source: str | Path) -> None:
    """Compare a local model's weights with the sums beside them, if there are any; once, by one process.

    Args:
        source: a folder, or a hub name, which is left alone.

    Raises:
        UserError: a file is missing or changed.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    try:
        sums = read_model_sums(folder, weights_only=True) or {}
    except LaterFormat as error:
        raise UserError(f"{folder / MODEL_SUMS} {error}") from error
    except (ValueError, OSError):
        sums = {}  # reported below
    with progress_bar(f"verifying {folder.name}", sum(known.bytes for known in sums.values()), BAR_BYTES) as advance:
        damage = next(changed_model_files(folder, advance, weights_only=True), None)
    if damage is not None:
        raise UserError(
            f"{damage}: the model is damaged; convert or copy it again (if the change is meant, delete {MODEL_SUMS} there)"
        )
