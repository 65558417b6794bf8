"""Exceptions that a user is meant to read: the command line prints them without a traceback."""


class UserError(Exception):
    """A user's mistake or a broken surrounding (file, port, server), told in one message.

    The command line prints the message without a traceback and exits with 2. The message names the key,
    file or line and says what to do.
    """


class WorkerDied(Exception):
    """A process of the run has died. The command line prints which and how, and its last words, and exits with 1."""

    def __init__(self, what: str, log: str = "") -> None:
        """Args:
        what: a clause: "rank 0 of RolloutGroup (process 17) was killed by SIGKILL".
        log: its last lines, under a line that names their file.
        """
        super().__init__(what, log)
        self.what = what
        self.log = log
        self.go_on = ""
        """What has been done, and how to go on with it: the end of the sentence."""

    def __str__(self) -> str:
        return f"{self.what}{self.go_on}\n{self.log}" if self.log else f"{self.what}{self.go_on}"
