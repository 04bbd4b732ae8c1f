#!/usr/bin/env bash
# Everything that needs a GPU, in one call with a budget; --help says more:
#
#   benchmarks/gpu_check.sh [--minutes 8] [--only correct|bars|model|sanitize] [--out gpu_check] [--rehearse]
set -euo pipefail
export PYTHONPATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m fastdiff.benchmarks.gpu_check "$@"
