# Shared by the scripts of this folder.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
. "$root/env.sh"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$root/.venv/bin/activate" ]; then . "$root/.venv/bin/activate"; fi

# edited NAME ...: stops if a path still is the example's.
edited() {
  for name in "$@"; do
    case ${!name} in /path/to/*)
      echo "$(basename "$0"): set $name first: in the file, or as in: $name=/data/... bash $0" >&2; exit 2 ;;
    esac
  done
}
