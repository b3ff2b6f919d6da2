#!/usr/bin/env bash
# Runs the CUDA backend on an emulated GPU (tests/emulator): no GPU, driver or nvcc, only g++ and python3 on x86-64. All fixtures through
# `verify --device cuda`, placements that must not change a bit, and the tests of tests/gpu that take seconds. Then kernels that overlap as
# on Hopper, each as early as it may, and watched access by access (tests/emulator/accesses.h): two kernels, or two threads of one, that touch the
# same memory with nothing to say which comes first are an error, whether it would show or not, and so is an access out of bounds. No grid counts as a
# small one there: those start in turn.
#
#   scripts/emulate-gpu.sh [TEST...]      # with names of tests, only those; the environment may order turns (tests/emulator/grid.h)
#
# The GPU has compute capability 8.0; and 9.0 for tests that take Hopper's own kernels there, whose threads then run in random order, the same
# in every run. Sums of its tensor cores are rounded once, a GPU's oftener; tests whose results lie at the border of their tolerance can differ.
set -euo pipefail
cd "$(dirname "$0")/.."

emulator="$PWD/target/emulator"
logs="$emulator/logs"
jobs=$(nproc)
tests=(dense:: sample:: ranks:: steps:: moe:: products::linear products::a_row products::an_expert products::many attention::gqa quantized::codes)
hoppers=(products::kernels_agree_on_{experts,linear,many} moe::{the_device_plans,planned} attention::a_row_{has,of_mla_has}_the_same_bits_past
    attention::{gqa,mla} products::{linear,mlp,a_row,an_expert})
if [ $# -gt 0 ]; then tests=("$@") hoppers=("$@"); fi
overlapping=(sample::{tokens,greedy,draws} attention::gqa dense:: steps::{steps_of,weights} moe::{planned,every,combine,the_device} world::the_device
    products::an_expert quantized::codes)

python3 tests/emulator/build.py "$emulator"
export MOEYARD_CUDA_EMULATOR="$emulator" LD_LIBRARY_PATH="$emulator${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
# Integration tests build the program too.
gpu=$(cargo test --locked --features cuda --test gpu --no-run --message-format=json |
    sed -n 's/.*"kind":\["test"\].*"executable":"\([^"]*\)".*/\1/p' | tail -1)

report() { # NAME STATUS LOG
    if [ "$2" = 0 ]; then echo "ok    $1"; else echo "FAIL  $1"; tail -5 "$3"; fi
    return "$2"
}
operation() { # CAPABILITY TEST
    local log="$logs/$1-${2//::/-}.txt" order=in-turn status=0
    if [ "$1" = 9.0 ]; then order=random; fi
    EMULATED_CAPABILITY="$1" EMULATED_ORDER="${EMULATED_ORDER:-$order}" timeout 600 "$gpu" --test-threads 1 "$2" >"$log" 2>&1 || status=$?
    # A name that no test has is no test.
    if grep -q 'running 0 tests' "$log"; then status=1; fi
    report "$1 $2, $(sed -n 's/^test result: [^.]*\. //p' "$log")" "$status" "$log"
}
verify() { # NAME MODEL DTYPE FLAGS...
    timeout 600 target/debug/moeyard verify "tests/fixtures/$2" --prompts "tests/fixtures/$2/golden.json" --out "$logs/$1.json" \
        --device cuda --dtype "$3" --max-model-len 512 --kv-cache-memory 16MiB "${@:4}" >"$logs/$1.txt" 2>&1
}
model() { # MODEL DTYPE FLAGS...
    local name status=0
    name=$(IFS=-; echo "$*" | tr -d ' ')
    verify "$name" "$@" &&
        python3 tests/fixtures/check_fixture.py "tests/fixtures/$1" "$logs/$name.json" --mode "$2" >>"$logs/$name.txt" 2>&1 || status=$?
    report "$name" "$status" "$logs/$name.txt"
}
placement() { # MODEL FLAGS: the logits of one rank, bit by bit
    local name status=0
    name="$1-$(echo "$2" | tr -d ' ')"
    # shellcheck disable=SC2086
    verify "$name" "$1" f32 $2 && cmp "$logs/$name.safetensors" "$logs/$1-f32.safetensors" >>"$logs/$name.txt" 2>&1 || status=$?
    report "$name" "$status" "$logs/$name.txt"
}
export -f report operation verify model placement
export gpu logs

each() { xargs --max-procs="$jobs" --replace=ARGUMENTS bash -c "$1 ARGUMENTS"; }

models() { # DTYPE...
    local golden name dtype
    for golden in tests/fixtures/*/golden.json; do
        name=$(basename "$(dirname "$golden")")
        if [ ! -f "tests/fixtures/$name/config.json" ]; then continue; fi
        for dtype in "$@"; do echo "$name $dtype"; done
    done | each model
}

mkdir -p "$logs"
if [ $# -eq 0 ]; then
    models f32 bf16
    for name in mixtral deepseek_v3; do
        for flags in "--expert-parallel-size 2" "--expert-parallel-size 4 --redundant-experts 4" "--prefill-chunk-size 5"; do
            echo "$name '$flags'"
        done
    done | sed "s/'/\\\\'/g" | each placement
fi
{ printf '9.0 %s\n' "${hoppers[@]}" && printf '8.0 %s\n' "${tests[@]}"; } | each operation
if [ $# -gt 0 ]; then exit; fi

echo "== kernels that overlap"
python3 tests/emulator/build.py "$emulator/watched" --watched
export LD_LIBRARY_PATH="$emulator/watched:$LD_LIBRARY_PATH" EMULATED_ORDER=early EMULATED_MULTIPROCESSORS=0
logs="$emulator/watched/logs"
mkdir -p "$logs"
models bf16
echo "deepseek_v3_fp8 bf16 --quantize fp8
mixtral bf16 --expert-parallel-size 2
deepseek_v3 bf16 --expert-parallel-size 2 --redundant-experts 4" | each model
# Few rows have a kernel of their own in grids that count as small.
echo "deepseek_v3 bf16 --prefill-chunk-size 5" | EMULATED_MULTIPROCESSORS=132 each model
{ printf '9.0 %s\n' attention::{mla_in,gqa_over} steps::steps_of moe::planned products::an_expert && printf '8.0 %s\n' "${overlapping[@]}"; } | each operation
