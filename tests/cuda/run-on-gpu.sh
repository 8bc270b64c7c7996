#!/usr/bin/env bash
# tests/cuda/run-on-gpu.sh - builds the cuda plugin and proves it on a machine with a GPU.
#
# Needs gcc, make and CUDA (CUDA=/usr/local/cuda), neither meson nor a network. What it finds goes to
# $OUT (default build/gpu/out): conform.txt and program.txt (results against the cpu's reference),
# sanitizer.txt (compute-sanitizer, where it is), bench.txt and bench.json (times against floors).
# Ends with 0 when all is right, 1 when something is wrong, 77 (and says so) when there is no GPU.
set -u
cd "$(dirname "$0")/../.."
B=${B:-build/gpu}
OUT=${OUT:-$B/out}
CUDA=${CUDA:-/usr/local/cuda}
mkdir -p "$OUT"

make -f tests/cuda/Makefile -j"$(nproc)" B="$B" CUDA="$CUDA" >"$OUT/build.txt" 2>&1 || {
    tail -n 40 "$OUT/build.txt"
    echo "FAILED: the build"
    exit 1
}

reason=$("$B/bench-cuda" --probe)
if [ $? -eq 77 ]; then
    echo "$reason"
    echo "All was built; nothing was run and nothing measured."
    exit 77
fi

failed=0
step() { # step NAME COMMAND...: its output goes to $OUT/NAME.txt
    local name=$1
    shift
    echo "== $name"
    "$@" >"$OUT/$name.txt" 2>&1
    local status=$?
    tail -n 60 "$OUT/$name.txt"
    if [ $status -ne 0 ]; then
        echo "FAILED: $name ($status)"
        failed=1
    fi
}

step conform "$B/check-conform" "$B/cpu.so" "$B/cuda.so"
step program "$B/check-program" "$B/cpu.so" "$B/cuda.so"
if [ -x "$CUDA/bin/compute-sanitizer" ]; then
    step sanitizer "$CUDA/bin/compute-sanitizer" --tool memcheck --error-exitcode 1 \
        "$B/check-program" "$B/cpu.so" "$B/cuda.so"
    step racecheck "$CUDA/bin/compute-sanitizer" --tool racecheck --error-exitcode 1 \
        "$B/check-program" "$B/cpu.so" "$B/cuda.so"
else
    echo "SKIPPED: compute-sanitizer is not in $CUDA/bin"
fi
step bench "$B/bench-cuda" "$OUT/bench.json"
[ $failed -eq 0 ] && echo "all right; results are in $OUT"
exit $failed
