#!/bin/sh
# mg2hf_3b.sh CHECKPOINT OUTPUT [BASE_MODEL]     CHECKPOINT is …/checkpoints/global_step_N/actor; any size of model will do
set -eu
if [ $# -lt 2 ]; then sed -n 2p "$0" >&2; exit 2; fi
root=$(cd "$(dirname "$0")/../../.." && pwd)
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$root/.venv/bin/activate" ]; then . "$root/.venv/bin/activate"; fi
exec searchr1 convert mg2hf --checkpoint "$1" --output "$2" ${3:+--hf-model "$3"}
