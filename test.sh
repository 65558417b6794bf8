#!/usr/bin/env bash
# All the set-up, then the checks and the tests.  ./test.sh            the default suite
#                                                 ./test.sh -m slow    any pytest arguments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./install.sh
. "${VENV:-.venv}/bin/activate"
# shellcheck source=env.sh
. ./env.sh
ruff check .
ruff format --check .
mypy
exec python -m pytest -q "$@"
