"""NQ with passages in the prompt: train.parquet and test.parquet. Needs --search HOST:PORT of a retrieval server."""

import sys

from common import run

if __name__ == "__main__":
    sys.exit(run(__doc__, "train,test", "./data/nq_rag", "rag"))
