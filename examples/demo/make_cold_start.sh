#!/usr/bin/env bash
# Makes examples/demo/cold_start again: tokenizer, a first stage on full answers, a second one that makes the model mediocre.
# About 15 minutes on two cores.   make_cold_start.sh [OUTPUT]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
. "$root/env.sh"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$root/.venv/bin/activate" ]; then . "$root/.venv/bin/activate"; fi
output=${1:-$here/cold_start}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

searchr1 demo-world --tokenizer --out "$work/tokenizer"
searchr1 demo-world --demonstrations full --worlds 40 --per-world 1200 --out "$work/full"
searchr1 demo-world --demonstrations mediocre --worlds 8 --per-world 1000 --seed 1 --out "$work/mediocre"
searchr1 sft --device cpu --fresh "$here/fresh_model" --tokenizer "$work/tokenizer" --data "$work/full/demonstrations.jsonl" \
  --output "$work/first" --lr 3e-3 --warmup 100 --tokens-per-batch 11000 --max-tokens-per-mbs 11000 --weight-decay 0.05 \
  --max-steps 650
searchr1 sft --device cpu --model "$work/first" --data "$work/mediocre/demonstrations.jsonl" \
  --output "$output" --lr 3e-4 --warmup 10 --tokens-per-batch 11000 --max-tokens-per-mbs 11000 --weight-decay 0.0 \
  --max-steps 80
