#!/usr/bin/env bash
# Exact dense search (e5, Flat). faiss_gpu=--faiss_gpu puts the index on the GPUs; without it, it is mapped from disk.
set -euo pipefail
WIKI2018_WORK_DIR=${WIKI2018_WORK_DIR:-/path/to/wiki}                       # EDIT: --save_path of download.py
corpus_file=${corpus_file:-$WIKI2018_WORK_DIR/wiki-18.jsonl}
index_file=${index_file:-$WIKI2018_WORK_DIR/e5.index/e5_Flat.index}
retriever_path=${retriever_path:-$WIKI2018_WORK_DIR/e5-base-v2}
faiss_gpu=${faiss_gpu-}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
edited WIKI2018_WORK_DIR
# shellcheck disable=SC2086
exec searchr1 retrieval-server --retriever_name e5 --retriever_model "$retriever_path" --index_path "$index_file" \
  --corpus_path "$corpus_file" --topk 3 --port 8000 $faiss_gpu "$@"
