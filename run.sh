#!/usr/bin/env bash
# All the set-up, then the main job: a small model learns to search a fictional encyclopedia.
#   ./run.sh                    the whole demo, 5 to 12 minutes on an idle machine with two cores
#   ./run.sh --steps 2          for the impatient
#   ./run.sh --help             the other choices
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./install.sh
. "${VENV:-.venv}/bin/activate"
. ./env.sh
exec python -m searchr1.cli demo "$@"
