#!/usr/bin/env bash
# Evaluates a model.   run_main_searchr1_single_eval.sh [CONFIG] [key=value ...]
# CONFIG is a name in examples/searchr1/config (without .yaml) or a path; default qwen2.5-3b-tool-1node-eval.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
. "$root/env.sh"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$root/.venv/bin/activate" ]; then . "$root/.venv/bin/activate"; fi

config=qwen2.5-3b-tool-1node-eval
case ${1:-} in "" | *=*) ;; *) config=$1; shift ;; esac
[ -f "$config" ] || config=$here/config/${config%.yaml}.yaml
exec searchr1 eval "$config" "$@"
