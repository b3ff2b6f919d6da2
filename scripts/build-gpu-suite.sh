#!/usr/bin/env bash
# Builds the folder that tests/gpu.sh runs on a machine with a GPU and neither Rust nor a network: stripped binaries, fixtures and demo
# models, packed. Needs the CUDA toolkit (scripts/setup-cuda.sh) and no GPU.
#
#   scripts/build-gpu-suite.sh [FOLDER]        # target/gpu-suite
#
# MOEYARD_SUITE_PROFILE=dev builds faster and computes the references slower; the kernels are the same.
set -euo pipefail
cd "$(dirname "$0")/.."

out="${1:-target/gpu-suite}"
profile="${MOEYARD_SUITE_PROFILE:-release}"
limit_mb=60

if [ -z "${CUDA_HOME:-}" ] || [ -z "${CUTLASS_HOME:-}" ]; then eval "$(scripts/setup-cuda.sh)"; fi
flags=(--locked --features cuda)
if [ "$profile" = release ]; then flags+=(--release); fi

# Integration tests build the program too.
cargo build "${flags[@]}"
built() { # KIND: path of the executable that the test or bench `gpu` was built into
    cargo test "${flags[@]}" "--$1" gpu --no-run --message-format=json |
        grep "\"kind\":\[\"$1\"\]" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1
}
folder=debug
if [ "$profile" = release ]; then folder=release; fi
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
mkdir -p "$parts/bin" "$parts/configs" "$parts/fixtures" "$parts/models"
strip -o "$parts/bin/moeyard" "target/$folder/moeyard"
strip -o "$parts/bin/gpu" "$(built test)"
strip -o "$parts/bin/gpu_bench" "$(built bench)"
cp -r tests/fixtures/. "$parts/fixtures/"
cp -r models/. "$parts/models/"
cp -r configs/models/. "$parts/configs/"

rm -rf "$out"
mkdir -p "$out"
cp tests/gpu.sh "$out/"
# The embedded model is in the program too: with a window this wide it is stored once.
tar -C "$parts" -c . | xz --threads=1 --lzma2=preset=6,dict=192MiB >"$out/suite.tar.xz"

size_mb=$(du -sm "$out" | cut -f1)
echo "$out: $size_mb MB"
[ "$size_mb" -le "$limit_mb" ] || { echo "build-gpu-suite.sh: more than $limit_mb MB" >&2; exit 1; }
