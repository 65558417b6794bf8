#!/usr/bin/env bash
# Evaluates a model.   run_main_searchr1_single_eval.sh [CONFIG] [key=value ...]
# CONFIG is a name in examples/searchr1/config (without .yaml) or a path; default qwen2.5-3b-tool-1node-eval.
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" eval qwen2.5-3b-tool-1node-eval "$@"
