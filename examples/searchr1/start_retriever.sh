#!/usr/bin/env bash
# A BM25 server over the ten documents of sample_data, or over corpus_file=...   start_retriever.sh [flags of the server]
# The index is built the first time; it needs no GPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
corpus_file=${corpus_file:-$here/sample_data/sample_corpus.jsonl}
index_dir=${index_dir:-results/bm25-$(basename "$corpus_file" .jsonl)}
. "$here/retrieval/common.sh"
if [ ! -e "$index_dir/manifest.json" ]; then
  searchr1 build-index --retriever_name bm25 --corpus_path "$corpus_file" --save_dir "$index_dir"
fi
exec searchr1 retrieval-server --retriever_name bm25 --index_path "$index_dir" --corpus_path "$corpus_file" \
  --topk 3 --port 8000 "$@"
