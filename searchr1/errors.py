"""Exceptions whose message is written for the user; the command line prints them without a traceback."""

from pathlib import Path


class UserError(Exception):
    """A mistake in the input, or a broken environment (file, port, server), described in one message.

    The command line prints the message without a traceback and exits with 2. `UserError("data.seed", "must be 0 or more")`
    reads `data.seed: must be 0 or more`; with one argument, the whole message is free text.
    """

    def __init__(self, key: str | Path, message: str | None = None) -> None:
        """Args:
        key: the configuration key, flag, file or line at fault; or, without `message`, the whole text.
        message: the problem and its fix.
        """
        super().__init__(*(str(key),) if message is None else (str(key), message))
        self.key = "" if message is None else str(key)
        self.message = str(key) if message is None else message

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class WorkerDied(Exception):
    """The end of a process of the run. The command line prints which and how, with its last lines, and exits with 1."""

    def __init__(self, what: str, log: str = "") -> None:
        """Args:
        what: a clause: "rank 0 of RolloutGroup (process 17) was killed by SIGKILL".
        log: its last lines, under a line that names their file.
        """
        super().__init__(what, log)
        self.what = what
        self.log = log
        self.go_on = ""
        """The end of the sentence: what has been saved, and how to resume from it."""

    def __str__(self) -> str:
        return f"{self.what}{self.go_on}\n{self.log}" if self.log else f"{self.what}{self.go_on}"
