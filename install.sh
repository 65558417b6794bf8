#!/usr/bin/env bash
# Makes .venv with everything in it, or reuses it when the lock has not changed.
#   ./install.sh          the `gpu` extra where there is a GPU, else the `cpu` extra
#   SEARCHR1_EXTRA=cpu ./install.sh     force one; the environment stays what it is until the other is named
# Other choices: PYTHON (default python3.11 or python3), VENV (default .venv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
venv=${VENV:-.venv}

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then python=$candidate; break; fi
  done
fi
if [ -z "$python" ]; then
  echo "install.sh: Python 3.11 was not found. Install it, or name it: PYTHON=/path/to/python3.11 ./install.sh" >&2
  exit 2
fi

case ${SEARCHR1_EXTRA:-} in ''|cpu|gpu) ;; *) echo "install.sh: SEARCHR1_EXTRA must be cpu or gpu, not '$SEARCHR1_EXTRA'" >&2; exit 2;; esac
# What the environment was made for, and whether SEARCHR1_EXTRA named it: `cpu chosen`. Commands read it too (searchr1/nvidia.py).
record=$venv/.searchr1-extra
recorded=$(cat "$record" 2>/dev/null || sed -n 's/.*-\([cg]pu\)$/\1/p' "$venv/.searchr1-stamp" 2>/dev/null || true)
extra=${SEARCHR1_EXTRA:-}
chosen=${extra:+ chosen}
if [ -z "$extra" ] && [ "${recorded#* }" = chosen ]; then
  extra=${recorded% *} chosen=" chosen"
  echo "install.sh: $venv was made with SEARCHR1_EXTRA=$extra and stays so; SEARCHR1_EXTRA=cpu or gpu changes it"
fi
# Decides, and refuses a driver, a compiler or headers that the GPU build cannot work with before anything is downloaded.
extra=$("$python" -m searchr1.nvidia choose $extra)
if [ "${recorded%% *}" = gpu ] && [ "$extra$chosen" = cpu ]; then
  echo "install.sh: no GPU here, but $venv has the GPU build. SEARCHR1_EXTRA=cpu makes it anew for the CPU; with VENV=.venv-cpu" \
    "before it, beside it." >&2
  exit 2
fi

# The stamp is written last: an installation that was cut short is done again.
wanted=$(cat pyproject.toml requirements/* install.sh | sha256sum | cut -d' ' -f1)-$extra
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.searchr1-stamp" 2>/dev/null || true)" = "$wanted" ]; then
  echo "$extra$chosen" > "$record"
  echo "install.sh: $venv is up to date ($extra)"
  exit 0
fi

if [ "$extra" = cpu ]; then takes="this takes two to five minutes"; else takes="5 GB are downloaded"; fi
echo "install.sh: installing into $venv ($extra); $takes"
start=$(date +%s)
# The packages of one extra would pass for those of the other, or hide them.
if [ -n "$recorded" ] && [ "${recorded%% *}" != "$extra" ]; then
  echo "install.sh: $venv has the ${recorded%% *} build: it is made anew"
  "$python" -m venv --clear "$venv"
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
rm -f "$venv/.searchr1-stamp"
echo "$extra$chosen" > "$record"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q --upgrade pip "setuptools>=77" wheel

if [ "$extra" = cpu ]; then
  # A plain `torch` would fetch several GB of CUDA packages. The CPU build is on PyTorch's own index unless the
  # machine offers it elsewhere (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL).
  torch=$(grep '^torch==' requirements/cpu.lock)
  pip install -q --no-deps "$torch" 2>/dev/null \
    || pip install -q --no-deps "$torch" --index-url "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
  # The lock names every package, so nothing is resolved. It leaves out torchvision, torchaudio and torchcodec: vLLM
  # asks for them, but their builds do not match this torch and then break transformers; text needs none of them.
  pip install -q --no-deps --prefer-binary -r requirements/cpu.lock
  pip install -q --no-deps --no-build-isolation -e .
else
  pip install -q --prefer-binary -c requirements/gpu.constraints -e ".[gpu,retrieval,dev]"
fi
"$venv/bin/python" - <<'PY'
import torch
import transformers  # noqa: F401
import vllm
print(f"install.sh: torch {torch.__version__}, vllm {vllm.__version__}")
PY
if [ "$extra" = gpu ]; then
  gpu=$("$venv/bin/python" -m searchr1.nvidia verify)
  echo "install.sh: computed on $gpu"
fi
echo "$wanted" > "$venv/.searchr1-stamp"
echo "install.sh: done in $(( $(date +%s) - start )) s"
