#!/usr/bin/env bash
# Everything that only a GPU can say, in one run of under eight minutes, into one folder.
# See "On a GPU" in benchmarks/README.md; `--help` has the arguments.
set -u

usage() {
    cat <<'TEXT'
usage: benchmarks/gpu_check.sh [--rehearse] FOLDER

Runs from the source tree with $PYTHON (default: .venv/bin/python, else python3), which needs torch,
Triton and pytest; no network, no git. Leaves in FOLDER a log of every stage (NN_stage.log), the
tests as JUnit XML, the benchmark's tables (bench_DTYPE/), the launch costs, the names of the
kernels that ran, and summary.txt.

  --rehearse   the same on a CPU, kernels interpreted, at tiny sizes: for errors in typing only

exit status: 0; 1 where a stage failed or ran out of its time; 2 where the arguments make no sense
TEXT
}

REHEARSE=0 FOLDER=
for argument in "$@"; do
    case $argument in
    -h | --help) usage && exit 0 ;;
    --rehearse) REHEARSE=1 ;;
    -*) echo "unknown argument $argument" >&2 && usage >&2 && exit 2 ;;
    *)
        if [ -n "$FOLDER" ]; then echo "more than one folder" >&2 && usage >&2 && exit 2; fi
        FOLDER=$argument
        ;;
    esac
done
if [ -z "$FOLDER" ]; then usage >&2 && exit 2; fi

mkdir -p "$FOLDER" || exit 2
OUT=$(cd "$FOLDER" && pwd)
cd "$(dirname "$0")/.." || exit 2
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
trap 'kill $(jobs -p) 2>/dev/null; exit 1' INT TERM

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR=$WORK/triton # one for all stages: what one compiles serves the next
unset FUSED_RNN_BACKEND FUSED_RNN_FP32_PRECISION

TOTAL=470 # seconds for everything; a stage gets its own limit or what is left
DEVICE=cuda EVERY=5 BENCH_BUDGET=0.3
# Every test marked gpu is in one of these, whatever it is called: name, then a -k expression.
TESTS=(
    "lstm:numerics and lstm and not lstm-proj"
    "lstm_proj:numerics and lstm-proj"
    "gru:numerics and gru and not gru-before and not lstm"
    "gru_before:numerics and gru-before and not lstm"
    "rnn:numerics and not lstm and not gru"
    "plans:not numerics and (kind or deterministic or batch)"
    "others:not numerics and not (kind or deterministic or batch)"
)
SIZES=() QUICK=() PROFILE=()
SELECTION=(gpu streaming online reinforcement_learning tagging time_series language_model)
SELECTION+=(ragged speech)
if [ $REHEARSE = 1 ]; then
    TOTAL=300 DEVICE=cpu EVERY=37 BENCH_BUDGET=0
    SELECTION=(gpu/ragged_h128 gpu/resets_h128)
    SIZES=(-T 2 -B 2 -I 16 -H 16) QUICK=(--quick) PROFILE=(--shapes 2 -T 2 -B 2 -H 16)
    export TRITON_INTERPRET=1 FUSED_RNN_GPU_REHEARSAL=1 CUDA_VISIBLE_DEVICES=
fi

# stage NAME LIMIT COMMAND...: runs it under its limit, its output in a log of its own. The number
# is given out by the caller's shell, so stages may run side by side.
NUMBER=0
stage() {
    local name=$1 limit=$2 left began=$SECONDS status=ok code
    shift 2
    left=$((TOTAL - SECONDS))
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    if [ "$limit" -le 0 ]; then
        echo "no time is left" >"$OUT/$name.log"
        status="not run"
    else
        timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
        code=$?
        if [ $code = 124 ] || [ $code = 137 ]; then
            status="over $limit s"
        elif [ $code = 77 ]; then # the usual status of what cannot be done here
            status=skipped
        elif [ $code != 0 ]; then
            status="status $code"
        fi
    fi
    printf '%-26s %-12s %4d s\n' "$name" "$status" $((SECONDS - began)) >"$WORK/$name.stage"
    cat "$WORK/$name.stage"
}
next() { # the next stage's name, numbered
    NUMBER=$((NUMBER + 1))
    NAME=$(printf '%02d_%s' $NUMBER "$1")
}

environment() {
    local tool status=0
    "$PYTHON" - "$DEVICE" <<'CODE' || status=1
import sys
from benchmarks import machine
for key, value in machine.describe(sys.argv[1]).items():
    print(f"{key:16} {value}")
CODE
    "$PYTHON" -m fused_rnn info || status=1
    echo "compilers: $(command -v c++ g++ clang++ cc gcc nvcc hipcc | tr '\n' ' ')"
    for tool in nvidia-smi rocm-smi; do
        if command -v $tool >/dev/null; then $tool; fi
    done
    return $status
}
build() { # the CPU backend; nothing on the GPU needs it
    if ! command -v c++ g++ clang++ | grep -q .; then
        echo "no C++ compiler"
        return 77
    fi
    if ! "$PYTHON" -c 'import os, sysconfig, setuptools
assert os.path.exists(sysconfig.get_path("include") + "/Python.h")'; then
        echo "no setuptools or no Python.h"
        return 77
    fi
    MAX_JOBS=${MAX_JOBS:-4} "$PYTHON" setup.py -q build_ext --inplace
}
tests() { # EXPRESSION XML: the tests marked gpu that a -k expression names
    local files
    files=$(grep -l 'pytest\.mark\.gpu' tests/test_*.py)
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest -q -m gpu -k "$1" -p no:cacheprovider --durations=5 \
        -o junit_family=xunit1 --junitxml="$2" $files
}
benchmark() { # DTYPE LIMIT
    "$PYTHON" -m benchmarks "${SELECTION[@]}" --device $DEVICE --dtypes "$1" --limit "$2" \
        --providers torch,ours,ours:triton --budget $BENCH_BUDGET ${SIZES[@]+"${SIZES[@]}"} \
        --out "$OUT/bench_$1"
}
# `timeout` runs programs, not functions: the functions above are run by a shell of their own.
export -f environment build tests benchmark
export PYTHON OUT DEVICE BENCH_BUDGET
in_shell() { # FUNCTION ARGUMENTS...: as a command for `stage`
    COMMAND=(bash -uc "$(declare -p SELECTION SIZES); $1 \"\$@\"" "$1" "${@:2}")
}

next environment
in_shell environment
stage "$NAME" 40 "${COMMAND[@]}"

# What is not timed runs side by side: most of it is compilation, one kernel at a time a process.
threads=${OMP_NUM_THREADS:-}
export OMP_NUM_THREADS=2
if [ $REHEARSE = 1 ]; then export OMP_NUM_THREADS=1; fi
next build
in_shell build
stage "$NAME" 90 "${COMMAND[@]}" &
for group in "${TESTS[@]}"; do
    next "tests_${group%%:*}"
    in_shell tests "${group#*:}" "$OUT/$NAME.xml"
    stage "$NAME" 200 "${COMMAND[@]}" &
done
for dtype in float32 float64 bfloat16 float16; do
    next verify_$dtype
    stage "$NAME" 200 "$PYTHON" -m fused_rnn verify --backend triton --device $DEVICE \
        --dtype $dtype --every $EVERY &
done
wait
if [ -n "$threads" ]; then export OMP_NUM_THREADS=$threads; else unset OMP_NUM_THREADS; fi

next launch_cost
stage "$NAME" 40 "$PYTHON" -m benchmarks.launch_cost --device $DEVICE ${QUICK[@]+"${QUICK[@]}"} \
    --json "$OUT/launch_cost.json"
next profile
stage "$NAME" 40 "$PYTHON" -m benchmarks.gpu_profile --device $DEVICE \
    ${PROFILE[@]+"${PROFILE[@]}"} --out "$OUT/kernels.txt"

# Each dtype's table gets its share of what is left, and ends by itself before the limit does it.
waiting=3
for dtype in float16 bfloat16 float32; do
    share=$(((TOTAL - 10 - SECONDS) / waiting))
    next bench_$dtype
    in_shell benchmark $dtype $((share > 25 ? share - 15 : 10))
    stage "$NAME" $share "${COMMAND[@]}"
    waiting=$((waiting - 1))
done

cat "$WORK"/*.stage | sort >"$OUT/stages.txt"
{
    echo "$([ $REHEARSE = 1 ] && echo "A REHEARSAL on a CPU: " )gpu_check, $SECONDS s"
    echo
    cat "$OUT"/01_environment.log
    echo && echo "== tests and verify"
    grep -hE '^(FAILED|ERROR|FAULT)|^verify:|[0-9]+ (passed|failed|skipped|errors?)\b' \
        "$OUT"/*_tests_*.log "$OUT"/*_verify_*.log
    echo && echo "== launch costs"
    cat "$OUT"/*_launch_cost.log
    for dtype in float16 bfloat16 float32; do
        echo && echo "== torch.nn against fused_rnn, $dtype"
        sed -n '/^case /,$ { /^written: /!p; }' "$OUT"/*_bench_$dtype.log
        grep -h '^note: .* left out' "$OUT"/*_bench_$dtype.log
    done
    echo && echo "== stages"
    cat "$OUT/stages.txt"
} >"$OUT/summary.txt" 2>&1

echo && cat "$OUT/stages.txt"
! grep -vqE '^[^ ]+ +(ok|skipped) ' "$OUT/stages.txt"
