#!/usr/bin/env bash
# Everything that only a GPU can say, in one run of under eight minutes, into one folder.
# See "On a GPU" in benchmarks/README.md; `--help` has the arguments.
set -u

usage() {
    cat <<'TEXT'
usage: benchmarks/gpu_check.sh [--rehearse] [--built] [--seconds N] FOLDER

Runs from the source tree with $PYTHON (default: .venv/bin/python, else python3), which needs torch,
Triton, pytest and pytest-xdist; no network, no git. Where nvcc is, it builds the CUDA backend for
the GPU that is here; where compute-sanitizer is, it runs that. Leaves in FOLDER a log of every
stage (NN_stage.log), the tests as JUnit XML, the benchmark's tables (bench_DTYPE/), what barriers
and exchanges between blocks cost (microbench.json), what a step of each scan takes (scans.json),
the launch costs, the names of the kernels that ran, and summary.txt.

  --built      use fused_rnn/*.so and build/microbench as they are, made elsewhere for a GPU like
               this one; builds only what does not load
  --seconds N  for everything together, 470 by default
  --rehearse   the same on a CPU, kernels interpreted or emulated, at tiny sizes: for errors in
               typing only. FUSED_RNN_CUDA_LIBRARY may name the emulated library, which is else
               built by what the tests need (ninja, pybind11, g++), or left out where that fails

environment: CASES, cases of the benchmark's tables, "gpu speech/h256"; all uses by default
             PROVIDERS, who is in them, "torch,ours:cuda"; torch,ours,ours:triton by default

exit status: 0; 1 where a stage failed or ran out of its time; 2 where the arguments make no sense
TEXT
}

REHEARSE=0 BUILT=0 TOTAL=470 FOLDER=
wrong() { echo "$1" >&2 && usage >&2 && exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --rehearse) REHEARSE=1 ;;
    --built) BUILT=1 ;;
    --seconds)
        shift
        TOTAL=${1-}
        case $TOTAL in '' | *[!0-9]*) wrong "--seconds wants a whole number, got '$TOTAL'" ;; esac
        ;;
    -*) wrong "unknown argument $1" ;;
    *)
        if [ -n "$FOLDER" ]; then wrong "more than one folder"; fi
        FOLDER=$1
        ;;
    esac
    shift
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

# Of the seconds for everything: for compilation, for all that runs side by side, and what the rest
# leaves to the benchmark's tables. (A stage gets its own limit or what is left.)
BUILD=130 CHECKS=160 RESERVE=$((TOTAL < 360 ? TOTAL / 4 : 90))
DEVICE=cuda EVERY=5 BENCH_BUDGET=0.3 SLACK=20
WORKERS=$(($(nproc) * 2 / 3)) # of the tests: sanitizers and verify run beside them
LARGE=2_31 # the tests of tensors of gigabytes, for two of which at once there is not the memory
CUDA_FILE=() # what pytest is told besides for tests/test_cuda.py and tests/test_cuda_grid.py
SIZES=() QUICK=() PROFILE=() SANITIZE=()
SELECTION=(gpu streaming online reinforcement_learning tagging time_series language_model)
SELECTION+=(ragged speech)
if [ $REHEARSE = 1 ]; then
    BUILD=200 CHECKS=320 WORKERS=2 DEVICE=cpu EVERY=37 BENCH_BUDGET=0
    SELECTION=(gpu/ragged_h128 gpu/resets_h128)
    SIZES=(-T 2 -B 2 -I 16 -H 16) QUICK=(--quick) PROFILE=(--shapes 2 -T 2 -B 2 -H 16)
    CUDA_FILE=(-k "kernels_agree or refuse or says_what") SANITIZE=(-T 1 -B 2 -H 23)
    export TRITON_INTERPRET=1 FUSED_RNN_GPU_REHEARSAL=1 CUDA_VISIBLE_DEVICES=
else
    unset FUSED_RNN_CUDA_LIBRARY # the one that is built here is checked
fi
if [ -n "${CASES:-}" ]; then read -ra SELECTION <<<"$CASES"; fi

# stage NAME LIMIT COMMAND...: runs it under its limit, its output in a log of its own. The number
# is given out by the caller's shell, so stages may run side by side. What is late gets $SIGNAL.
NUMBER=0 SIGNAL=TERM
stage() {
    local name=$1 limit=$2 left began=$SECONDS status=ok code
    shift 2
    left=$((TOTAL - RESERVE - SECONDS))
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    if [ "$limit" -le 0 ]; then
        echo "no time is left" >"$OUT/$name.log"
        status="not run"
    else
        timeout -s $SIGNAL -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
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
has_nvcc() { [ "$("$PYTHON" tools/build_cuda.py)" = 1 ]; }
build() { # the CPU backend, which nothing on the GPU needs, and where nvcc is the CUDA library
    if ! command -v c++ g++ clang++ | grep -q .; then
        echo "no C++ compiler"
        return 77
    fi
    if ! "$PYTHON" -c 'import os, sysconfig, setuptools
assert os.path.exists(sysconfig.get_path("include") + "/Python.h")'; then
        echo "no setuptools or no Python.h"
        return 77
    fi
    if ! has_nvcc; then
        FUSED_RNN_CUDA=0 "$PYTHON" setup.py -q build_ext --inplace || return
        echo "no nvcc: the CPU backend alone is built"
        return 77
    fi
    # For the GPUs that are here alone, which takes a fraction of the time; Hopper has instructions
    # of its own under the name 9.0a. A rehearsal builds for one, only to see that it compiles.
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch
here = {torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())}
names = ["{}.{}".format(*one) + "a" * (one == (9, 0)) for one in sorted(here or {(9, 0)})]
print(";".join(names))') || return
    export TORCH_CUDA_ARCH_LIST
    echo "TORCH_CUDA_ARCH_LIST=$TORCH_CUDA_ARCH_LIST"
    FUSED_RNN_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace
}
loads() { # whether libraries and microbench that were built elsewhere are there and run here
    "$PYTHON" -c 'import fused_rnn, sys
found = fused_rnn.available_backends()
print({name: found[name] for name in ("cpu", "cuda")})
sys.exit(any(found[name] for name in ("cpu", "cuda")))' && build/microbench --help >/dev/null &&
        cp build/microbench "$WORK"
}
microbench_build() { # beside the library; one architecture is enough, that of the first GPU
    local architecture
    if ! has_nvcc; then echo "no nvcc" && return 77; fi
    architecture=$("$PYTHON" -c 'import torch
here = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else (9, 0)
print("sm_{}{}".format(*here) + "a" * (here == (9, 0)))') || return
    "$PYTHON" tools/build_microbench.py --arch "$architecture" --out "$WORK/microbench"
}
scans() {
    if [ -n "$CUDA_MISSING" ]; then echo "$CUDA_MISSING" && return 77; fi
    "$PYTHON" -m benchmarks.scans --device $DEVICE --limit 45 "$@" --json "$OUT/scans.json"
}
microbench() {
    local code
    if [ ! -x "$WORK/microbench" ]; then echo "it is not built" && return 77; fi
    "$WORK/microbench" --quick --json "$OUT/microbench.json"
    code=$?
    if [ $code = 3 ]; then return 77; fi # there is no GPU, as it has said
    return $code
}
emulator() { # writes the path of the emulated library to a file
    if [ -z "${FUSED_RNN_CUDA_LIBRARY:-}" ]; then
        PYTHONPATH=tests "$PYTHON" -c 'import emulation
print(emulation.build_cuda_library())' >"$WORK/emulated" || return 77
    fi
}
why_no_cuda() { # a line that says why the CUDA backend is not available, or nothing
    "$PYTHON" -c 'import fused_rnn
print(fused_rnn.available_backends()["cuda"] or "")'
}
run_pytest() { # XML ARGUMENTS...
    # (The setting is what poisoned memory needs of cuBLAS; see tests/test_gpu.py. Interrupted, as a
    # shell's background processes are not by themselves, pytest still says what failed.)
    CUBLAS_WORKSPACE_CONFIG=:4096:8 "$PYTHON" -c 'import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))' -v -p no:cacheprovider --durations=8 --tb=short \
        -o junit_family=xunit1 --junitxml="$1" "${@:2}"
}
tests() { # XML WORKERS EXPRESSION: the tests marked gpu that a -k expression names
    local files
    files=$(grep -l 'pytest\.mark\.gpu' tests/test_*.py | tac) # calls and grids before numerics
    # shellcheck disable=SC2086
    run_pytest "$1" -m gpu -n "$2" --dist loadgroup -k "$3" $files
}
cuda_file() { # XML WORKERS: the tests of every size of block scan, and of grid scans
    if [ -n "$CUDA_MISSING" ]; then echo "$CUDA_MISSING" && return 77; fi
    run_pytest "$1" -n "$2" ${CUDA_FILE[@]+"${CUDA_FILE[@]}"} tests/test_cuda.py \
        tests/test_cuda_grid.py
}
verify() { # BACKEND DTYPE
    if [ "$1" = cuda ] && [ -n "$CUDA_MISSING" ]; then echo "$CUDA_MISSING" && return 77; fi
    "$PYTHON" -m fused_rnn verify --backend "$1" --device $DEVICE --dtype "$2" --every $EVERY
}
find_sanitizer() { # beside nvcc, which may itself be a script somewhere else
    local nvcc top path
    command -v compute-sanitizer && return
    nvcc=$("$PYTHON" -c 'import os, sys
sys.path.insert(0, "tools")
import build_cuda
print(build_cuda.find_nvcc(os.environ) or "")')
    if [ -z "$nvcc" ]; then return 1; fi
    top=$("$nvcc" --dryrun -c -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
    for path in "${top:-$(dirname "$nvcc")/..}"/{bin,compute-sanitizer}/compute-sanitizer; do
        if [ -x "$path" ]; then echo "$path" && return; fi
    done
    return 1
}
sanitize() { # TOOL
    local sanitizer command options=()
    if [ -n "$CUDA_MISSING" ]; then echo "$CUDA_MISSING" && return 77; fi
    command=("$PYTHON" -m benchmarks.sanitize --device $DEVICE ${SANITIZE[@]+"${SANITIZE[@]}"})
    if [ "$1" = initcheck ]; then
        # It has to see who writes what, so all kernels take part, and those of cuBLAS had better
        # not; without the step path then.
        command+=(--kernels block,grid)
    else
        options=(--kernel-regex kns=fused_rnn) # by a part of the mangled name: ours alone
    fi
    if [ $REHEARSE = 1 ]; then
        "${command[@]}"
        return
    fi
    if ! sanitizer=$(find_sanitizer); then
        echo "no compute-sanitizer, neither on PATH nor beside nvcc"
        return 77
    fi
    # Without torch's cache every tensor is an allocation of its own, whose ends the tool knows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 1 \
        ${options[@]+"${options[@]}"} "${command[@]}"
}
benchmark() { # DTYPE LIMIT
    "$PYTHON" -m benchmarks "${SELECTION[@]}" --device $DEVICE --dtypes "$1" --limit "$2" \
        --providers "$PROVIDERS" --budget $BENCH_BUDGET ${SIZES[@]+"${SIZES[@]}"} \
        --out "$OUT/bench_$1"
}
# `timeout` runs programs, not functions: the functions above are run by a shell of their own.
export -f environment has_nvcc loads build microbench_build emulator run_pytest tests cuda_file
export -f verify find_sanitizer sanitize microbench scans benchmark
export PYTHON OUT WORK DEVICE REHEARSE EVERY BENCH_BUDGET
in_shell() { # FUNCTION ARGUMENTS...: as a command for `stage`
    local arrays
    arrays=$(declare -p SELECTION SIZES CUDA_FILE SANITIZE)
    COMMAND=(bash -uc "$arrays; $1 \"\$@\"" "$1" "${@:2}")
}

next environment
in_shell environment
stage "$NAME" 40 "${COMMAND[@]}"

if [ $BUILT = 1 ]; then
    next loads
    in_shell loads
    stage "$NAME" 40 "${COMMAND[@]}"
    if ! grep -q ' ok ' "$WORK/$NAME.stage"; then BUILT=0; fi
fi
if [ $BUILT = 0 ]; then
    next microbench_build
    in_shell microbench_build
    stage "$NAME" $BUILD "${COMMAND[@]}" &
    next build
    in_shell build
    stage "$NAME" $BUILD "${COMMAND[@]}"
fi
if [ $REHEARSE = 1 ]; then # once, before all the tests would do so at the same time
    next emulator
    in_shell emulator
    stage "$NAME" $BUILD "${COMMAND[@]}"
    if [ -s "$WORK/emulated" ]; then export FUSED_RNN_CUDA_LIBRARY=$(<"$WORK/emulated"); fi
fi

# Without nvcc, and in a rehearsal without an emulated library, there is no CUDA backend and nothing
# to complain of. Anything else that is wrong with it will show where it is asked for.
export CUDA_MISSING='' PROVIDERS=${PROVIDERS:-torch,ours,ours:triton} PROFILED=torch,ours:triton
reason=$(why_no_cuda)
if [ -z "$reason" ]; then
    PROFILED=torch,ours:cuda
elif [ $REHEARSE = 1 ] && [ -z "${FUSED_RNN_CUDA_LIBRARY:-}" ]; then
    CUDA_MISSING="FUSED_RNN_CUDA_LIBRARY names no emulated library: $reason"
elif [ $REHEARSE = 0 ] && ! has_nvcc; then
    CUDA_MISSING="no nvcc: $reason"
fi

# What is not timed runs side by side: most of it is compilation, one kernel at a time a process.
# `verify` of a backend's dtypes runs one after the other, or the tests, which take longest, would
# share the processors with eight more.
threads=${OMP_NUM_THREADS:-}
export OMP_NUM_THREADS=2
if [ $REHEARSE = 1 ]; then export OMP_NUM_THREADS=1; fi
SIGNAL=INT
next tests_gpu
in_shell tests "$OUT/$NAME.xml" $WORKERS "not $LARGE"
stage "$NAME" $CHECKS "${COMMAND[@]}" &
next tests_large
in_shell tests "$OUT/$NAME.xml" 0 $LARGE
stage "$NAME" $CHECKS "${COMMAND[@]}" &
next tests_cuda_file
in_shell cuda_file "$OUT/$NAME.xml" 3
stage "$NAME" $CHECKS "${COMMAND[@]}" &
SIGNAL=TERM
DTYPES=(float32 float64 bfloat16 float16)
for backend in triton cuda; do
    for dtype in "${DTYPES[@]}"; do
        next verify_${backend}_$dtype
        in_shell verify $backend $dtype
        stage "$NAME" $CHECKS "${COMMAND[@]}"
    done &
    NUMBER=$((NUMBER + ${#DTYPES[@]})) # those of the loop, which counts in a shell of its own
done
for tool in memcheck racecheck synccheck initcheck; do
    next sanitize_$tool
    in_shell sanitize $tool
    stage "$NAME" $CHECKS "${COMMAND[@]}" &
done
wait
if [ -n "$threads" ]; then export OMP_NUM_THREADS=$threads; else unset OMP_NUM_THREADS; fi

next microbench
in_shell microbench
stage "$NAME" 60 "${COMMAND[@]}"
next scans
in_shell scans ${QUICK[@]+"${QUICK[@]}"}
stage "$NAME" 60 "${COMMAND[@]}"
next launch_cost
stage "$NAME" 30 "$PYTHON" -m benchmarks.launch_cost --device $DEVICE ${QUICK[@]+"${QUICK[@]}"} \
    --json "$OUT/launch_cost.json"
next profile
stage "$NAME" 45 "$PYTHON" -m benchmarks.gpu_profile --device $DEVICE --providers $PROFILED \
    ${PROFILE[@]+"${PROFILE[@]}"} --out "$OUT/kernels.txt"

# Each dtype's table gets its share of what is left. Once that is over it begins no further row, and
# has SLACK seconds besides to start, to end its last row and to print.
RESERVE=0 waiting=3
for dtype in float16 bfloat16 float32; do
    share=$(((TOTAL - 10 - SECONDS) / waiting - SLACK))
    if [ $share -lt 5 ]; then share=5; fi
    next bench_$dtype
    in_shell benchmark $dtype $share
    stage "$NAME" $((share + SLACK)) "${COMMAND[@]}"
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
    echo && echo "== compute-sanitizer"
    for tool in memcheck racecheck synccheck initcheck; do
        echo "$tool:" && grep -hE '^FAULT|^sanitize:|^no |SUMMARY' "$OUT"/*_sanitize_$tool.log
    done
    echo && echo "== barriers, exchanges, latencies"
    cat "$OUT"/*_microbench.log
    echo && echo "== a step of each scan against the model; all in scans.json"
    grep -hE ': measured / model |^note:|^error' "$OUT"/*_scans.log
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
