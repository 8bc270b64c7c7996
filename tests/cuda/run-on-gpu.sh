#!/usr/bin/env bash
# tests/cuda/run-on-gpu.sh - builds the cuda plugin and proves it on a machine with a GPU.
#
# Needs gcc (11 or newer), make and CUDA, neither meson nor a network nor development packages. CUDA
# is where NVCC (default: nvcc of the PATH, then /usr/local/cuda/bin/nvcc) says that it lives. What
# is found goes to $OUT (default $B/out; $B is build/gpu):
#
#   conform.txt     gqa-plugin-check's matrix against the cpu's reference
#   program.txt     whole small models against it
#   experts.txt     mixtures of experts of every kind
#   adapters.txt    adapters of several ranks
#   sanitizer.txt   the models under compute-sanitizer: memcheck
#   racecheck.txt   and racecheck
#   sanitizer-experts.txt, racecheck-experts.txt, and -adapters.txt   these too
#   bench.txt       times against floors, also bench.json
#
# Ends with 0 when all was run and is right, 1 when something is wrong, 2 when it cannot be built,
# 77 when there is no GPU: then nothing was run, and it says what.
set -u
cd "$(dirname "$0")/../.." || exit 2
B=${B:-build/gpu}
OUT=${OUT:-$B/out}
case $B in
*[[:space:]]*)
    echo "B=$B: make cannot build in a path with spaces; relative ones are seen from $PWD"
    exit 2
    ;;
esac
mkdir -p "$OUT" || exit 2

build() { make -f tests/cuda/Makefile B="$B" "$@"; }

echo "== build"
if ! build -j"$(nproc)" >"$OUT/build.txt" 2>&1; then
    tail -n 40 "$OUT/build.txt"
    echo "FAILED: the build; all of it is in $OUT/build.txt"
    exit 2
fi
CUDA=$(build -s cuda-home)
sanitizer=$CUDA/bin/compute-sanitizer

steps=(conform program experts adapters sanitizer racecheck sanitizer-experts racecheck-experts
    sanitizer-adapters racecheck-adapters bench)
command_of() { # sets command to the step's
    case $1 in
    conform) command=("$B/check-conform" "$B/cpu.so" "$B/cuda.so") ;;
    program) command=("$B/check-program" "$B/cpu.so" "$B/cuda.so") ;;
    experts | adapters) command=("$B/check-$1" "$B/cpu.so" "$B/cuda.so") ;;
    sanitizer) command=("$sanitizer" --tool memcheck --error-exitcode 1 "$B/check-program" "$B/cpu.so" "$B/cuda.so") ;;
    racecheck) command=("$sanitizer" --tool racecheck --error-exitcode 1 "$B/check-program" "$B/cpu.so" "$B/cuda.so") ;;
    sanitizer-*) command=("$sanitizer" --tool memcheck --error-exitcode 1 "$B/check-${1#*-}" "$B/cpu.so" "$B/cuda.so") ;;
    racecheck-*) command=("$sanitizer" --tool racecheck --error-exitcode 1 "$B/check-${1#*-}" "$B/cpu.so" "$B/cuda.so") ;;
    bench) command=("$B/bench-cuda" "$OUT/bench.json") ;;
    esac
}

reason=$("$B/bench-cuda" --probe)
status=$?
echo "$reason"
if [ $status -eq 77 ]; then
    echo "ALL WAS BUILT AND NOTHING RUN. Not run, for want of a GPU: ${steps[*]}"
    exit 77
fi

failed=()
for step in "${steps[@]}"; do
    command_of "$step"
    echo "== $step"
    if [ ! -x "${command[0]}" ]; then
        echo "NOT RUN: ${command[0]} is not there"
        failed+=("$step")
        continue
    fi
    "${command[@]}" >"$OUT/$step.txt" 2>&1
    status=$?
    tail -n 60 "$OUT/$step.txt"
    if [ $status -ne 0 ]; then
        echo "FAILED: $step ($status)"
        failed+=("$step")
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "WRONG: ${failed[*]}; results are in $OUT"
    exit 1
fi
echo "all right; results are in $OUT"
