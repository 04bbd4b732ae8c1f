#!/usr/bin/env bash
# Everything that needs a GPU, in parts of under eight minutes, the most important first:
#
#   benchmarks/gpu_check.sh [correct|sanitize|targets|tune|model|sample] ...     (without a part: all of them)
#
# Needs a checkout and a Python with PyTorch, Triton, numpy, pytest, Pillow and safetensors. pytest-xdist and Liger are
# used if present. Only sample may need more than one run: it resumes. Rows are written to $OUT (default: gpu_check) when
# their table is complete, so that an interrupted run keeps them. Without a GPU the kernels are interpreted and the
# figures are those of a small CPU run, which only shows that the script works.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$(realpath -m "${OUT:-gpu_check}")
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
failed=0

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU: the kernels are interpreted, and the figures say nothing about a GPU"
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
fi

# The tests' settings without the plugins that a bare machine lacks
cat >"$OUT/pytest.ini" <<'INI'
[pytest]
addopts = --import-mode=importlib
markers = slow
    timeout
filterwarnings = error
    ignore:`torch.jit.script_method` is:DeprecationWarning
    ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning
INI
tests() { # tests FOLDER_OR_FILE [arguments]
    local folder=$1
    [[ -d $folder ]] || folder=$(dirname "$folder")
    "$PYTHON" -m pytest -q -c "$OUT/pytest.ini" --rootdir "$PWD" --confcutdir "$folder" -p no:cacheprovider "$@"
}

tests_of_models() { # the golden numbers through the kernels
    tests tests/parity/test_unet.py tests/parity/test_loops.py tests/parity/test_training.py -k triton
}

part() {
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    local began=$SECONDS
    timeout "$limit" bash -c '"$@"' part "$@" 2>&1 | tee "$OUT/$name.log"
    local status=${PIPESTATUS[0]}
    echo "== $name: exit $status after $((SECONDS - began)) s"
    ((status == 0)) || failed=1
}
export -f tests tests_of_models
export OUT PYTHON

for name in "${@:-correct sanitize targets tune model sample}"; do
    for one in $name; do
        case $one in
            correct)
                parallel=$("$PYTHON" -c 'import importlib.util as u; print("-n 8" if u.find_spec("xdist") else "")')
                part correct_first 120 tests tests/kernels/test_every_kernel.py
                part correct_model 350 tests_of_models
                part correct_update 100 tests tests/training/test_update.py -k gpu
                part correct_kernels 470 tests tests/kernels -m "not slow" $parallel
                ;;
            sanitize)
                if command -v compute-sanitizer >/dev/null; then
                    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # one allocation per tensor, to see accesses beyond its end
                    for tool in memcheck racecheck; do
                        part "sanitize_$tool" 230 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                            "$PYTHON" -m pytest -q -c "$OUT/pytest.ini" --rootdir "$PWD" --confcutdir tests/kernels \
                            -p no:cacheprovider tests/kernels/test_every_kernel.py
                    done
                    unset PYTORCH_NO_CUDA_MEMORY_CACHING
                else
                    echo "== sanitize: skipped, compute-sanitizer is not installed"
                fi
                ;;
            targets | tune | model | sample)
                part "$one" 470 "$PYTHON" -m fastdiff.benchmarks.gpu_check "$one" --csv "$OUT/$one.csv" --seconds 440
                ;;
            *)
                echo "gpu_check.sh: no part $one: correct, sanitize, targets, tune, model or sample" >&2
                exit 2
                ;;
        esac
    done
done
exit $failed
