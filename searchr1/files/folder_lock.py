"""One process at a time writes into a folder: also across nodes that share a file system.

`FOLDER/run.lock` names the process that has the folder. A dead process's lock is taken over by making
`run.lock.DIGEST`, where DIGEST is of the dead one's content: only one process can make that file, however many try, and it
is in turn taken over in the same way. The owner is therefore the last one of the chain that begins at `run.lock`. Nothing
but the exclusive creation of a file is asked of the file system (no flock, which many shared ones ignore).

Whether an owner on this machine lives is asked of the system (process number and start time, so a stopped process counts as
alive); one that is elsewhere, or in another container, is dead after two minutes without a heartbeat, by the file system's
own clock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from searchr1.errors import UserError

NAME = "run.lock"
HEARTBEAT_S = 20.0
SILENCE_S = 120.0
"""An owner that cannot be asked about is dead after this long without a heartbeat."""
MOST_BYTES = 4096
ATTEMPTS = 200
WRITING_S = 0.5
"""How long a lock that was just made may be without its content."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that has a folder, as its lock describes it."""

    command: str
    host: str
    process: int
    since: str
    boot: str
    """The machine's boot: another one on a machine of the same name, and after a restart."""
    pid_namespace: int
    process_started: int
    nonce: str

    @classmethod
    def this_process(cls, command: str) -> Owner:
        """Describe this process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        pid = os.getpid()
        return cls(
            command, socket.gethostname(), pid, since, _boot(), _pid_namespace(), _started(pid) or 0, secrets.token_hex(16)
        )

    @classmethod
    def parse(cls, content: bytes) -> Owner | None:
        """Read a lock's content; None if it is not one."""
        try:
            row = json.loads(content)
            values = {field.name: row[field.name] for field in fields(cls)}
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        numbers = ("process", "pid_namespace", "process_started")
        right = all(type(value) is (int if name in numbers else str) for name, value in values.items())
        return cls(**values) if right else None

    def __str__(self) -> str:
        shown = f"{self.command} on {self.host}, process {self.process}, since {self.since}"
        return "".join(character if character.isprintable() else "?" for character in shown[:300])


@dataclass(frozen=True, slots=True)
class _Link:
    """A lock file."""

    path: Path
    content: bytes
    modified: float

    @property
    def owner(self) -> Owner | None:
        return Owner.parse(self.content)

    @property
    def successor(self) -> Path:
        return self.path.with_name(f"{NAME}.{hashlib.sha256(self.content).hexdigest()[:24]}")


class FolderLock:
    """A folder that this process has. Use `folder_lock`."""

    def __init__(self, folder: Path, key: str, command: str) -> None:
        """Take the folder, and make it if it is missing.

        Raises:
            UserError: another process has it, or it cannot be written.
        """
        self._folder, self._key = folder, key
        self._owner = Owner.this_process(command)
        self._content = json.dumps(asdict(self._owner), indent=1).encode() + b"\n"
        self._made: list[Path] = []
        self._before = _modified(folder)
        self._stop = threading.Event()
        try:
            self._path = self._acquire()
        except OSError as error:
            self._remove_made()
            raise UserError(f"{key}: cannot write {folder}: {error.strerror}; give another one") from error
        except UserError:
            self._remove_made()
            raise
        self._locked = _modified(folder)
        self._beat = threading.Thread(target=self._heartbeat, name=f"lock of {folder}", daemon=True)
        self._beat.start()

    def require(self) -> None:
        """Check that the folder is still this process's.

        Raises:
            UserError: it is not: this process was stopped for so long that another one took it for dead.
        """
        chain = _chain(self._folder)
        if chain and chain[-1].path == self._path and chain[-1].content == self._content:
            return
        by = f"taken over by {chain[-1].owner or 'another process'}" if chain else f"without its {NAME}"
        raise UserError(
            f"{self._key}: {self._folder} is {by}, so that this run ends; start it again with another name once you know "
            "which of the two is wanted"
        )

    def release(self) -> None:
        """Release the folder as it was: without the lock, of its old age, and not at all if it was made for the lock."""
        if os.getpid() != self._owner.process:
            return  # a fork of the owner
        self._stop.set()
        untouched = self._before is not None and _modified(self._folder) == self._locked
        with suppress(UserError, OSError):
            self.require()
            # `run.lock` first: whoever follows the chain from there finds the folder free, and never half of it.
            for link in _chain(self._folder):
                link.path.unlink(missing_ok=True)
            if untouched:
                os.utime(self._folder, ns=(time.time_ns(), self._before or 0))
        self._remove_made()

    def _acquire(self) -> Path:
        for _ in range(ATTEMPTS):
            self._make_folder()
            chain = _chain(self._folder)
            path, before = self._folder / NAME, None
            if chain:
                before = chain[-1]
                path = before.successor
                if (problem := _in_use(before, self._folder)) is not None:
                    raise UserError(f"{self._key}: {self._folder} is in use{problem}")
            if not _create(path, self._content):
                time.sleep(random.uniform(0, 0.02))
                continue
            chain = _chain(self._folder)
            if chain and chain[-1].path == path and chain[-1].content == self._content:
                if before is not None:
                    print(f"{self._folder}: taken over from {before.owner or 'a process'}, which has ended", flush=True)
                return path
            path.unlink(missing_ok=True)  # what it was to follow has been given back meanwhile
        if not self._folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        raise UserError(f"{self._key}: {self._folder} is in use: other processes take it again and again; give another one")

    def _make_folder(self) -> None:
        missing = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        for folder in reversed(missing):
            with suppress(FileExistsError, FileNotFoundError):  # others make and remove it too
                folder.mkdir()
                self._made.append(folder)

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # something came into it
                return

    def _heartbeat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with suppress(OSError):  # `require` reports a lock that is gone
                os.utime(self._path)


@contextmanager
def folder_lock(folder: Path, key: str, command: str) -> Iterator[FolderLock]:
    """Lock a folder for this process for as long as the block runs.

    Args:
        folder: need not exist.
        key: the setting or flag that names the folder, for messages.
        command: what this process is, for the messages of others.

    Raises:
        UserError: another process has it, or it cannot be written.
    """
    lock = FolderLock(folder, key, command)
    try:
        yield lock
    finally:
        lock.release()


def is_lock(name: str) -> bool:
    """Return whether a file of this name is a lock's."""
    return name == NAME or name.startswith(f"{NAME}.")


def _in_use(link: _Link, folder: Path) -> str | None:
    """Return the message about a lock whose owner lives; None if it is dead."""
    owner = link.owner
    if owner is not None and owner.boot == _boot() != "" and owner.pid_namespace == _pid_namespace():
        alive = _started(owner.process) == owner.process_started
        return f" by {owner}; wait for it to end, or give another one" if alive else None
    silence = max(0.0, _file_system_now(folder) - link.modified)
    if silence > SILENCE_S:
        return None
    by = f" by {owner}" if owner is not None else f" ({link.path.name} names no process)"
    return (
        f"{by}; wait for it to end, or give another one (last sign of life {silence:.0f} s ago; a process that is not on "
        f"this machine counts as dead after {SILENCE_S:.0f} s)"
    )


def _chain(folder: Path) -> list[_Link]:
    """Return the locks from the first to the one that counts; empty if nobody has the folder."""
    links: list[_Link] = []
    path = folder / NAME
    while all(path != link.path for link in links) and (link := _read(path)) is not None:
        links.append(link)
        path = link.successor
    return links


def _read(path: Path) -> _Link | None:
    """Return a lock file, or None; wait a moment for the content of one that is being written."""
    for wait in (0.0, 0.01, 0.05, WRITING_S):
        time.sleep(wait)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)  # after opening: a shared file system asks its server then
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, f"{path.name} is not a plain file")
            content = os.read(descriptor, MOST_BYTES)
        finally:
            os.close(descriptor)
        if Owner.parse(content) is not None:
            break
    return _Link(path, content, status.st_mtime)


def _create(path: Path, content: bytes) -> bool:
    """Make a file with this content, if there is none of that name."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except (FileExistsError, FileNotFoundError):  # the folder was removed by another process that made it
        return False
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return True


def _modified(folder: Path) -> int | None:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def _file_system_now(folder: Path) -> float:
    """Return the time by the clock that stamps files in this folder; another node's may be minutes away from ours."""
    probe = folder / f"{NAME}.clock-{secrets.token_hex(8)}"
    try:
        probe.touch(exist_ok=False)
        os.utime(probe)
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _started(process: int) -> int | None:
    """Return when a process of this machine started, in clock ticks after boot; None if it is not there or has ended."""
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in (b"Z", b"X") else int(rest[18])
