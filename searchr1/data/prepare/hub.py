"""Files of the Hugging Face hub, kept in its cache; a download that was cut off goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

from searchr1.data.prepare.sets import REPOSITORY
from searchr1.errors import UserError

ANSWER_WITHIN_S = 15


def fetch(name: str, revision: str | None = None) -> tuple[Path, str]:
    """A file of `REPOSITORY`, and the commit it belongs to. One that is cached is not fetched again; without a connection it
    is taken as it is.

    Raises:
        UserError: no such file or revision, no connection and nothing cached, no space.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

    try:
        path = Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", revision=revision, etag_timeout=ANSWER_WITHIN_S))
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError too
        raise UserError(
            f"{REPOSITORY} {name}: cannot be downloaded and is not in the cache ({_reason(error)}). Check the connection "
            "(HF_ENDPOINT names a mirror, HF_HUB_OFFLINE must not be set) and run this again: what is complete is kept. Or "
            "copy the repository here by other means and give its folder with --local"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"--revision {revision}: {REPOSITORY} has no such revision") from error
    except EntryNotFoundError as error:
        raise UserError(
            f"{REPOSITORY} has no {name}; it may have been renamed on the hub. Give an older --revision, or a file with "
            "--input"
        ) from error
    except Exception as error:  # what the library raises differs by version: connection, time-out, disk, access
        raise UserError(
            f"{REPOSITORY} {name}: the download failed ({_reason(error)}). Check the connection and the free space, then "
            "run this again: it goes on where it stopped"
        ) from error
    return path, path.parents[len(Path(name).parts) - 1].name  # …/snapshots/COMMIT/name


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = str(cause).strip().partition("\n")[0] or type(cause).__name__
    return text.rstrip(".")
