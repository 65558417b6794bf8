#!/usr/bin/env bash
# Makes .venv with everything in it, or reuses it when the lock has not changed.
#   ./install.sh          the `gpu` extra where nvidia-smi finds a GPU, else the `cpu` extra
#   SEARCHR1_EXTRA=cpu ./install.sh     force one
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

extra=${SEARCHR1_EXTRA:-}
if [ -z "$extra" ]; then
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then extra=gpu; else extra=cpu; fi
fi
case $extra in cpu|gpu) ;; *) echo "install.sh: SEARCHR1_EXTRA must be cpu or gpu, not '$extra'" >&2; exit 2;; esac

# The stamp is written last: an installation that was cut short is done again.
wanted=$(cat pyproject.toml requirements/* install.sh | sha256sum | cut -d' ' -f1)-$extra
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.searchr1-stamp" 2>/dev/null || true)" = "$wanted" ]; then
  echo "install.sh: $venv is up to date ($extra)"
  exit 0
fi

echo "install.sh: installing into $venv ($extra); this takes two to five minutes"
start=$(date +%s)
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
rm -f "$venv/.searchr1-stamp"
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
import sys
import torch
import transformers  # noqa: F401
import vllm  # noqa: F401
print(f"install.sh: torch {torch.__version__}, vllm {vllm.__version__}, CUDA {'found' if torch.cuda.is_available() else 'none'}")
PY
echo "$wanted" > "$venv/.searchr1-stamp"
echo "install.sh: done in $(( $(date +%s) - start )) s"
