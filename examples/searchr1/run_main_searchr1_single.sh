#!/usr/bin/env bash
# Trains on one node.   run_main_searchr1_single.sh [CONFIG] [key=value ...]
# CONFIG is a name in examples/searchr1/config (without .yaml) or a path; default qwen2.5-3b-tool-1node.
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" train qwen2.5-3b-tool-1node "$@"
