"""Ask a trained model:  python infer.py --model_path results/model --prompt "Who …?" [--retriever-url http://127.0.0.1:8000]"""

import sys

from searchr1.cli import main

if __name__ == "__main__":
    sys.exit(main(["infer", *sys.argv[1:]]))
