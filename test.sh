#!/usr/bin/env bash
# All the set-up, then the checks and the tests.  ./test.sh            the default suite
#                                                 ./test.sh -m slow    pytest options go to every part of it
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./install.sh || exit
. "${VENV:-.venv}/bin/activate"
. ./env.sh
# verl's formulas are compared with ours. Of its wheel only files are read, so it stays beside the environment, and without
# the packages `tests` and `scripts` that come with it and would hide ours.
oracles=$VIRTUAL_ENV/oracles
if [ ! -e "$oracles/verl-0.9.1.dist-info" ]; then
  python -m pip install -q --disable-pip-version-check --no-deps --target "$oracles" verl==0.9.1 \
    && rm -rf "$oracles/tests" "$oracles/scripts" \
    || echo "test.sh: verl could not be installed: its comparisons will be skipped" >&2
fi
ruff check . && ruff format --check . && mypy || exit

# vLLM's engine and the actor each want a process of their own, as they have in a run. Each part runs in two processes,
# the tests of a file in one of them; -n 0 runs in one.
failed=0
part() {
  python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
  local code=$?
  [ $code = 0 ] || [ $code = 5 ] || failed=$code
}
part tests/rollout "$@"
part --ignore=tests/rollout "$@"
exit $failed
