"""`searchr1 ARGUMENTS…`, which also writes one line to a file descriptor when a call to a worker group begins or ends.

    python benchmarks/kills/driver.py FD train CONFIG.yaml [key=value ...]

The lines say when a phase begins, to the millisecond; nothing else differs from the command itself.
"""

from __future__ import annotations

import os
import signal
import sys


def main(descriptor: int, arguments: list[str]) -> int:
    """Run a sub-command."""
    os.set_inheritable(descriptor, False)
    # As a terminal has them, whoever started this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    from searchr1 import cli
    from searchr1.cluster.worker_group import Call

    def mark(text: str) -> None:
        os.write(descriptor, f"{text}\n".encode())

    begin, wait = Call.__init__, Call.wait

    def marked_begin(self, result, name, timeout_s):
        mark(f"begin {name}")
        begin(self, result, name, timeout_s)

    def marked_wait(self, timeout_s=None):
        result = wait(self, timeout_s)
        mark(f"end {self.name}")
        return result

    Call.__init__, Call.wait = marked_begin, marked_wait
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
