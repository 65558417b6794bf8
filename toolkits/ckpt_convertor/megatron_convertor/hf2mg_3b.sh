#!/bin/sh
# hf2mg_3b.sh MODEL OUTPUT     MODEL is a folder with config.json and safetensors files, of any size
set -eu
if [ $# -lt 2 ]; then sed -n 2p "$0" >&2; exit 2; fi
root=$(cd "$(dirname "$0")/../../.." && pwd)
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$root/.venv/bin/activate" ]; then . "$root/.venv/bin/activate"; fi
exec searchr1 convert hf2mg --hf-model "$1" --output "$2"
