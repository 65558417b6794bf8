"""The retrieval server under the name and with the flags that users of Search-R1 and RLinf know."""

import sys

from searchr1.cli import main

if __name__ == "__main__":
    sys.exit(main(["retrieval-server", *sys.argv[1:]]))
