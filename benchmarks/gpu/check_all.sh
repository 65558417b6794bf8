#!/usr/bin/env bash
# Everything that docs/guides/gpu.md reports, on the first GPU, one after the other: 15 to 20 minutes.
#   benchmarks/gpu/check_all.sh [FOLDER]      logs go there (default runs/gpu-checks); exit code 1 if a check failed
# CHECKS="actor engine" picks some: tests actor engine loop training sync.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. ./env.sh
if [ -f "${VENV:-.venv}/bin/activate" ]; then . "${VENV:-.venv}/bin/activate"; fi
out=${1:-runs/gpu-checks}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()

check() { # NAME SECONDS COMMAND…: its last lines, and all of them in a file
  local name=$1 limit=$2 started=$SECONDS code
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  grep -vE "WARNING|INFO|Warning:|it/s\]|^$" "$out/$name.log" | tail -n 25 | cut -c1-200
  echo "== $name ended with $code after $((SECONDS - started)) s"
  [ $code = 0 ] || failed+=("$name")
}
wanted() { [[ " ${CHECKS:-tests actor engine loop training sync} " == *" $1 "* ]]; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
git log -1 --format='commit %h' 2>/dev/null
if wanted tests; then check tests 300 python3 -m pytest -q -p no:cacheprovider -m gpu tests; fi
if wanted actor; then
  for backend in fsdp megatron; do check "actor-$backend" 180 python3 benchmarks/gpu/check_actor.py $backend; done
fi
if wanted engine; then
  check engine-fp32 180 python3 benchmarks/gpu/check_engine.py --shape small --dtype fp32 --eager
  check engine-bf16 180 python3 benchmarks/gpu/check_engine.py --shape small
  check engine-3b 300 python3 benchmarks/gpu/check_engine.py --shape 3b
fi
if wanted loop; then
  for backend in fsdp megatron; do
    rm -rf "$out/loop-$backend"
    check "loop-$backend" 400 python3 -m searchr1.cli demo --steps 2 --out "$out/loop-$backend" actor.training_backend=$backend \
      actor.offload_weight=True actor.offload_grad=True actor.offload_optimizer=True
    # One step more, from the checkpoint.
    check "resume-$backend" 400 python3 -m searchr1.cli demo --steps 3 --out "$out/loop-$backend" actor.training_backend=$backend \
      actor.offload_weight=True actor.offload_grad=True actor.offload_optimizer=True
  done
fi
if wanted sync; then check sync 120 python3 benchmarks/weight_sync.py --shape 3b --device cuda; fi
if wanted training; then
  check training 600 python3 benchmarks/train_throughput.py --json "$out/training.json"
  check training-kept 200 python3 benchmarks/train_throughput.py --shapes qwen2.5-3b --backends fsdp --no-recompute
fi
echo "${#failed[@]} failed: ${failed[*]-}"
[ ${#failed[@]} = 0 ]
