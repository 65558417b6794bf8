#!/usr/bin/env bash
# All the set-up, then the main job: a small model learns to search a fictional encyclopedia.
#   ./run.sh                    the whole demo, on the first GPU where there is one, else 5 to 12 minutes on two idle cores
#   SEARCHR1_EXTRA=cpu ./run.sh on the CPU of a machine with a GPU
#   ./run.sh --steps 2          for the impatient
#   ./run.sh --help             the other choices
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./install.sh
. "${VENV:-.venv}/bin/activate"
. ./env.sh
exec python -m searchr1.cli demo "$@"
