# Settings that every process of searchr1 profits from; sourced by run.sh, test.sh and the example scripts.
# glibc gives large blocks back to the kernel at once, and every training step then faults its pages in again:
# keeping them made a 2M-parameter training step on a CPU 2 to 5 times faster.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-8589934592}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-67108864}
# Nothing is reported to anybody unless the user asks for it.
export VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1} DO_NOT_TRACK=${DO_NOT_TRACK:-1}
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
