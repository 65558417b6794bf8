#!/usr/bin/env bash
# Approximate dense search on a CPU, in a fourteenth of the memory. Build the index once:
#   searchr1 build-index --corpus_path CORPUS --save_dir $WIKI2018_WORK_DIR/e5_ivfpq --retriever_model E5 --faiss_type IVFPQ --device cuda
set -euo pipefail
WIKI2018_WORK_DIR=${WIKI2018_WORK_DIR:-/path/to/wiki}                       # EDIT: --save_path of download.py
corpus_file=${corpus_file:-$WIKI2018_WORK_DIR/wiki-18.jsonl}
index_dir=${index_dir:-$WIKI2018_WORK_DIR/e5_ivfpq}
retriever_path=${retriever_path:-$WIKI2018_WORK_DIR/e5-base-v2}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
edited WIKI2018_WORK_DIR
exec searchr1 retrieval-server --retriever_name e5 --retriever_model "$retriever_path" --index_path "$index_dir" \
  --corpus_path "$corpus_file" --topk 3 --port 8000 "$@"
