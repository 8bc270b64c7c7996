#!/usr/bin/env bash
# tests/cuda/run-on-gpu.sh - builds the cuda plugin and proves it on a machine with a GPU.
#
#   run-on-gpu.sh [PART...]
#
# Needs gcc (11 or newer), make and CUDA, neither meson nor a network nor development packages. CUDA
# is where NVCC (default: nvcc of the PATH, then /usr/local/cuda/bin/nvcc) says that it lives. What
# is found goes to $OUT (default $B/out; $B is build/gpu), a file for each part, as it is found:
#
#   floors.txt      the shares of memory's and the tensor cores' speed that are asked for
#   conform.txt     gqa-plugin-check's matrix against the cpu's reference
#   program.txt     whole small models against it
#   experts.txt     mixtures of experts of every kind
#   adapters.txt    adapters of several ranks
#   graphs.txt      replayed steps while somebody votes
#   cublaslt.txt    rows of prompts by cuBLASLt
#   bench.txt       times against floors: kernels, whole models; bench.json the same, also floors.json
#   sanitizer.txt   the models under compute-sanitizer: memcheck
#   racecheck.txt   and racecheck
#   sanitizer-experts.txt, racecheck-experts.txt, and -adapters.txt   these too
#   summary.txt     which of them ran and were right, and the shares
#
# Runs by itself and ends in time: no part takes longer than its limit, nor all together longer than
# BUDGET_S (default 570 seconds); what is stopped or fails is told, and the next part begins. What
# did not have its turn has it when the script is called again; parts that are named run anew.
# EMULATED GPUs are slow: BENCH_FLAGS=--tiny makes floors and bench end.
#
# Ends with 0 when all was run and is right, 1 when something is wrong, 2 when it cannot be built,
# 3 when what was run is right and something was not, 77 when there is no GPU: then nothing was run,
# and it says what. A share that is missed is told, and not wrong.
set -um # m: each part is a process group of its own, which can be stopped as one
cd "$(dirname "$0")/../.." || exit 2
B=${B:-build/gpu}
OUT=${OUT:-$B/out}
BUDGET_S=${BUDGET_S:-570}
read -r -a bench_flags <<<"${BENCH_FLAGS:-}"
BUILD_LIMIT_S=420
case $B in
*[[:space:]]*)
    echo "B=$B: make cannot build in a path with spaces; relative ones are seen from $PWD"
    exit 2
    ;;
esac
mkdir -p "$OUT" || exit 2

build() { make -f tests/cuda/Makefile B="$B" "$@"; }

# limited SECONDS FILE COMMAND...: runs it, its output in the file; its status, or 124 when it was stopped.
# What does not end even when it is killed (a driver that hangs) is left behind.
limited() {
    local deadline=$((SECONDS + $1)) file=$2 pid
    shift 2
    "$@" >"$file" 2>&1 </dev/null &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        if [ $SECONDS -ge $deadline ]; then
            kill -TERM -- "-$pid" 2>/dev/null
            sleep 2
            kill -KILL -- "-$pid" 2>/dev/null
            sleep 1
            kill -0 "$pid" 2>/dev/null || wait "$pid" 2>/dev/null
            return 124
        fi
        sleep 0.2
    done
    wait "$pid" 2>/dev/null
}

echo "== build"
if ! limited "$BUILD_LIMIT_S" "$OUT/build.txt" build -j"$(nproc)"; then
    tail -n 40 "$OUT/build.txt"
    echo "FAILED: the build; all of it is in $OUT/build.txt"
    exit 2
fi
CUDA=$(build -s cuda-home)
sanitizer=$CUDA/bin/compute-sanitizer
# cuBLASLt, where nobody told the linker of CUDA's folder.
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$CUDA/lib64"

parts=(floors conform program experts adapters graphs cublaslt bench sanitizer racecheck sanitizer-experts
    racecheck-experts sanitizer-adapters racecheck-adapters)
command_of() { # sets command to the part's, and limit to its seconds
    local check=${1#*-} tool=memcheck
    limit=120
    case $1 in
    floors) command=("$B/bench-cuda" "${bench_flags[@]}" --json "$OUT/floors.json" floors) limit=180 ;;
    bench) command=("$B/bench-cuda" "${bench_flags[@]}" --json "$OUT/bench.json") limit=300 ;;
    graphs) command=("$B/check-graphs" "$B/cuda.so") ;;
    conform) command=("$B/check-conform" "$B/cpu.so" "$B/cuda.so") limit=240 ;;
    program | experts | adapters | cublaslt) command=("$B/check-$1" "$B/cpu.so" "$B/cuda.so") ;;
    *)
        [ "$check" = "$1" ] && check=program
        [ "${1%%-*}" = racecheck ] && tool=racecheck
        command=("$sanitizer" --tool "$tool" --error-exitcode 1 "$B/check-$check" "$B/cpu.so" "$B/cuda.so")
        ;;
    esac
}

limited 60 "$OUT/probe.txt" "$B/bench-cuda" --probe
status=$?
cat "$OUT/probe.txt"
if [ $status -eq 77 ]; then
    echo "ALL WAS BUILT AND NOTHING RUN. Not run, for want of a GPU: ${parts[*]}"
    exit 77
elif [ $status -ne 0 ]; then
    echo "FAILED: the GPU cannot be opened ($status)"
    exit 1
fi

is_known() {
    local part
    for part in "${parts[@]}"; do
        [ "$part" = "$1" ] && return
    done
    echo "$1: no part; there are ${parts[*]}"
    exit 2
}
for part; do
    is_known "$part"
    rm -f "$OUT/$part.status"
done
[ $# -eq 0 ] && set -- "${parts[@]}"

for part; do
    command_of "$part"
    left=$((BUDGET_S - SECONDS - 5))
    if [ "$OUT/$part.status" -nt "$B/cuda.so" ] && [ "$OUT/$part.status" -nt "${command[0]}" ]; then
        read -r status seconds again <"$OUT/$part.status"
        [ -z "$again" ] && continue # it had its turn in an earlier call
    fi
    rm -f "$OUT/$part.status"
    echo "== $part"
    if [ ! -x "${command[0]}" ]; then
        echo "NOT RUN: ${command[0]} is not there"
        continue
    elif [ $left -lt 5 ]; then
        echo "NOT RUN: its turn is when this is called again"
        continue
    fi
    began=$SECONDS again=
    if [ $left -lt $limit ]; then
        limit=$left again=again # where that is too little: it has not had its whole time
    fi
    limited "$limit" "$OUT/$part.txt" "${command[@]}"
    status=$?
    if [ $status -eq 124 ]; then
        echo "STOPPED after $limit s" >>"$OUT/$part.txt"
    else
        again=
    fi
    tail -n 60 "$OUT/$part.txt"
    echo "$status $((SECONDS - began)) $again" >"$OUT/$part.status"
done

# summary: a line for each part, then the shares
wrong=0 missing=0
summary() {
    local part status seconds again
    cat "$OUT/probe.txt"
    for part in "${parts[@]}"; do
        if [ ! -e "$OUT/$part.status" ]; then
            echo "NOT RUN  $part"
            missing=1
            continue
        fi
        read -r status seconds again <"$OUT/$part.status"
        case $status in
        0) echo "right    $part ($seconds s)" ;;
        77)
            echo "NOT RUN  $part: $(tail -n 1 "$OUT/$part.txt")"
            missing=1
            ;;
        124)
            echo "STOPPED  $part ($seconds s)${again:+, and begins again when this is called again}"
            missing=1
            ;;
        *)
            echo "WRONG    $part ($status, $seconds s)"
            wrong=1
            ;;
        esac
    done
    echo "shares that are asked for:"
    if [ -e "$OUT/floors.txt" ]; then
        sed -n '/wanted/p;/NOT MEASURED/p' "$OUT/floors.txt"
    fi
}
echo "== summary"
summary >"$OUT/summary.txt"
cat "$OUT/summary.txt"
if [ $wrong -ne 0 ]; then
    echo "WRONG: see above; results are in $OUT"
    exit 1
elif [ $missing -ne 0 ]; then
    echo "what was run is right, and not all was run; results are in $OUT"
    exit 3
fi
echo "all right; results are in $OUT"
