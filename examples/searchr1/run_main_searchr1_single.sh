#!/usr/bin/env bash
# Trains on one node.   run_main_searchr1_single.sh [CONFIG] [key=value ...]
# CONFIG is a name in examples/searchr1/config (without .yaml) or a path; default qwen2.5-3b-tool-1node.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
. "$root/env.sh"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$root/.venv/bin/activate" ]; then . "$root/.venv/bin/activate"; fi

config=qwen2.5-3b-tool-1node
case ${1:-} in "" | *=*) ;; *) config=$1; shift ;; esac
[ -f "$config" ] || config=$here/config/${config%.yaml}.yaml
exec searchr1 train "$config" "$@"
