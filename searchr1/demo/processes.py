"""Processes that the demo starts: the sub-commands of searchr1, and the retrieval server that they use."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from searchr1.errors import UserError
from searchr1.shutdown import Stopped, ended_at_once

PROGRAM = (sys.executable, "-m", "searchr1.cli")
SERVER_TIMEOUT_S = 60.0
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Server:
    """A retrieval server in a process of its own."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def require_running(self) -> None:
        """Require that the server still runs.

        Raises:
            UserError: it has ended; nothing can be searched any more.
        """
        code = self.process.poll()
        if code is not None:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise UserError(
                f"the retrieval server (process {self.process.pid}) {how}, so the demo stops; start it again to go on. The "
                f"server's last words: {_last_words(self.log)}"
            )


def run_command(*arguments: object, env: dict[str, str] | None = None, server: Server | None = None) -> None:
    """Run a sub-command in a process of its own. Forward a signal that stops this process to it.

    Args:
        arguments: of searchr1.
        env: variables on top of this process's.
        server: that the command needs.

    Raises:
        UserError: the command failed, after its own message; or the server has ended.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ searchr1 {shlex.join(words)}", flush=True)
    process = subprocess.Popen([*PROGRAM, *words], env=os.environ | (env or {}))
    with ended_at_once(process.kill):
        try:
            while process.poll() is None:
                if server is not None:
                    server.require_running()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        except BaseException as error:
            process.send_signal(error.signum if isinstance(error, Stopped) else signal.SIGTERM)
            process.wait()
            raise
    if process.returncode:
        raise UserError(f"searchr1 {words[0]} ended with exit code {process.returncode}; see its message above")


@contextmanager
def retrieval_server(world: Path, log: Path) -> Iterator[Server]:
    """Run a retrieval server of a world on a free port for as long as the block runs.

    Args:
        world: folder with the corpus and the pages.
        log: file for the server's output.

    Raises:
        UserError: the server did not start.
    """
    address_file = world / "address"
    address_file.unlink(missing_ok=True)
    words = ["retrieval-server", "--retriever_name", "bm25", "--corpus_path", str(world / "corpus.jsonl")]
    words += ["--pages_path", str(world / "pages.jsonl"), "--port", "0", "--save-address-to", str(address_file)]
    print(f"\n$ searchr1 {shlex.join(words)} &", flush=True)
    with log.open("w", encoding="utf-8") as output:
        # In a process group of its own: Ctrl-C must not end it before the command that uses it.
        server = subprocess.Popen([*PROGRAM, *words], stdout=output, stderr=output, process_group=0)
    with ended_at_once(server.kill):
        try:
            deadline = time.monotonic() + SERVER_TIMEOUT_S
            while not address_file.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise UserError(f"the retrieval server did not start; its last words: {_last_words(log)}")
                time.sleep(0.05)
            print(log.read_text(encoding="utf-8").strip(), flush=True)
            yield Server(address_file.read_text(encoding="utf-8"), server, log)
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def _last_words(log: Path) -> str:
    return log.read_text(errors="replace", encoding="utf-8")[-500:].strip() or f"none (in {log})"
