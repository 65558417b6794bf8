"""Evaluation questions of several sets in one test.parquet."""

import sys

from common import run

if __name__ == "__main__":
    sys.exit(run(__doc__, "test", "./data/nq_search", sets="all"))
