#!/usr/bin/env bash
# Two stages in one server: ten passages by e5, the best three of them by a cross-encoder.
set -euo pipefail
WIKI2018_WORK_DIR=${WIKI2018_WORK_DIR:-/path/to/wiki}                       # EDIT: --save_path of download.py
corpus_file=${corpus_file:-$WIKI2018_WORK_DIR/wiki-18.jsonl}
index_file=${index_file:-$WIKI2018_WORK_DIR/e5.index/e5_Flat.index}
retriever_path=${retriever_path:-$WIKI2018_WORK_DIR/e5-base-v2}
reranker=${reranker:-/path/to/ms-marco-MiniLM-L12-v2}                      # EDIT: a cross-encoder
faiss_gpu=${faiss_gpu---faiss_gpu}                                          # faiss_gpu= for a server without a GPU
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
edited WIKI2018_WORK_DIR reranker
# shellcheck disable=SC2086
exec searchr1 retrieval-server --retriever_name e5 --retriever_model "$retriever_path" --index_path "$index_file" \
  --corpus_path "$corpus_file" --reranker_model "$reranker" --topk_retrieval 10 --topk_rerank 3 --port 8000 $faiss_gpu "$@"
