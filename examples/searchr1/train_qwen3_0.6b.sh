#!/usr/bin/env bash
# Trains Qwen3-0.6B on one GPU of 12 GB.   train_qwen3_0.6b.sh [key=value ...]
# BASE_MODEL is a hub name or a folder, default Qwen/Qwen3-0.6B. Start a retrieval server before.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "$here/run_main_searchr1_single.sh" qwen3-0.6b-1gpu \
  "rollout.model.model_path=${BASE_MODEL:-Qwen/Qwen3-0.6B}" "$@"
