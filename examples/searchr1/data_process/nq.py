"""NQ for a model that reasons without searching: train.parquet and test.parquet."""

import sys

from common import run

if __name__ == "__main__":
    sys.exit(run(__doc__, "train,test", "./data/nq", "cot"))
