#!/usr/bin/env bash
# Builds an index of a corpus. Edit the paths; further flags can be given, for instance --retriever_name bm25.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

WIKI2018_WORK_DIR=${WIKI2018_WORK_DIR:-/path/to/wiki}                       # EDIT: --save_path of download.py
corpus_file=${corpus_file:-$WIKI2018_WORK_DIR/wiki_corpus.jsonl}
save_dir=${save_dir:-$WIKI2018_WORK_DIR/e5.index}
retriever_name=${retriever_name:-e5}
retriever_model=${retriever_model:-$WIKI2018_WORK_DIR/e5-base-v2}
device=${device:-cuda}

faiss_type=${faiss_type:-Flat}

. "$here/retrieval/common.sh"
edited WIKI2018_WORK_DIR
exec searchr1 build-index --corpus_path "$corpus_file" --save_dir "$save_dir" --retriever_name "$retriever_name" \
  --retriever_model "$retriever_model" --faiss_type "$faiss_type" --device "$device" "$@"
