#!/usr/bin/env bash
# Search-R1's training set (NQ, HotpotQA) and its seven evaluation sets.   data_process.sh [LOCAL_DIR] [flags of prepare-data]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
. "$root/env.sh"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$root/.venv/bin/activate" ]; then . "$root/.venv/bin/activate"; fi
local_dir=data/nq_hotpotqa_train
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then local_dir=$1 && shift; fi
# Evaluation first: training questions are looked for in it (--drop-overlap).
python "$here/qa_search_test_merge.py" --local_dir "$local_dir" "$@"
python "$here/qa_search_train_merge.py" --local_dir "$local_dir" "$@"
