#!/usr/bin/env bash
# BM25. Build the index once:
#   searchr1 build-index --retriever_name bm25 --corpus_path CORPUS --save_dir $WIKI2018_WORK_DIR/bm25
set -euo pipefail
WIKI2018_WORK_DIR=${WIKI2018_WORK_DIR:-/path/to/wiki}                       # EDIT: --save_path of download.py
corpus_file=${corpus_file:-$WIKI2018_WORK_DIR/wiki-18.jsonl}
index_dir=${index_dir:-$WIKI2018_WORK_DIR/bm25}
workers=${workers:-4}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
edited WIKI2018_WORK_DIR
exec searchr1 retrieval-server --retriever_name bm25 --index_path "$index_dir" --corpus_path "$corpus_file" \
  --workers "$workers" --topk 3 --port 8000 "$@"
