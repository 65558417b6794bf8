#!/usr/bin/env bash
# What the run_*.sh here do.   launch.sh train|eval DEFAULT [CONFIG] [key=value ...]
# CONFIG is a name in examples/searchr1/config (without .yaml) or a path; DEFAULT is taken where it is left out.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
. "$root/env.sh"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$root/.venv/bin/activate" ]; then . "$root/.venv/bin/activate"; fi

command=$1 config=$2
shift 2
case ${1:-} in "" | *=*) ;; *) config=$1; shift ;; esac
[ -f "$config" ] || config=$here/config/${config%.yaml}.yaml
exec searchr1 "$command" "$config" "$@"
