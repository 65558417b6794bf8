#!/usr/bin/env bash
# A cross-encoder in a server of its own; a retrieval server uses it with --reranker_url HOST:6980.
set -euo pipefail
reranker=${reranker:-/path/to/ms-marco-MiniLM-L12-v2}                      # EDIT: a cross-encoder
device=${device:-cuda}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
edited reranker
exec searchr1 rerank-server --reranker_model "$reranker" --rerank_topk 3 --device "$device" --port 6980 "$@"
