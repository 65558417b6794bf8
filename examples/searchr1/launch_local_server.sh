#!/usr/bin/env bash
# Starts the local wiki server. Edit the paths; further flags can be given, for instance --port 8001.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

WIKI2018_WORK_DIR=${WIKI2018_WORK_DIR:-/path/to/wiki}                       # EDIT: --save_path of download.py
index_file=${index_file:-$WIKI2018_WORK_DIR/e5.index/e5_Flat.index}
corpus_file=${corpus_file:-$WIKI2018_WORK_DIR/wiki_corpus.jsonl}
pages_file=${pages_file:-$WIKI2018_WORK_DIR/wiki_webpages.jsonl}
retriever_name=${retriever_name:-e5}
retriever_path=${retriever_path:-$WIKI2018_WORK_DIR/e5-base-v2}
faiss_gpu=${faiss_gpu---faiss_gpu}                                          # faiss_gpu= for a server without a GPU

. "$here/retrieval/common.sh"
edited WIKI2018_WORK_DIR
# shellcheck disable=SC2086
exec python "$here/local_retrieval_server.py" --index_path "$index_file" --corpus_path "$corpus_file" \
  --pages_path "$pages_file" --topk 3 --retriever_name "$retriever_name" --retriever_model "$retriever_path" \
  $faiss_gpu --port 8000 "$@"
