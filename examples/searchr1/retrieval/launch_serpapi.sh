#!/usr/bin/env bash
# SerpAPI in front of Google (engine=serpapi-bing for Bing): key in SERPAPI_API_KEY. snippet_only= fetches the pages too.
set -euo pipefail
engine=${engine:-serpapi-google}
cache_dir=${cache_dir:-$HOME/.cache/searchr1/online}
snippet_only=${snippet_only---snippet_only}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck disable=SC2086
exec searchr1 retrieval-server --engine "$engine" --cache_dir "$cache_dir" --search_concurrency 256 --topk 3 --port 8000 \
  $snippet_only "$@"
