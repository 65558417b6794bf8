"""Training questions of several sets in one train.parquet."""

import sys

from common import run

if __name__ == "__main__":
    sys.exit(run(__doc__, "train", "./data/nq_search", sets="nq,hotpotqa"))
