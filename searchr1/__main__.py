"""`python -m searchr1`: the command line."""

from __future__ import annotations

import sys

from searchr1.cli import main

if __name__ == "__main__":
    sys.exit(main())
