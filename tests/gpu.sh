#!/usr/bin/env bash
# The self-check and benchmarks of the CUDA backend, in a folder made by scripts/build-gpu-suite.sh. Needs a GPU, its driver and python3;
# neither Rust nor a network. A table of everything that ran is printed last.
#
#   FOLDER/gpu.sh [LOG_FOLDER [PART...]]
#
# Parts: operations models nccl sanitizer bench whole; all of them without one. NCCL is taken from MOEYARD_NCCL_SO, beside this script, or
# from torch's packages.
set -uo pipefail
cd "$(dirname "$0")"

if [ ! -d bin ]; then tar -xJf suite.tar.xz || exit 1; fi

logs="${1:-$(mktemp -d)}"
mkdir -p "$logs"
if [ $# -gt 1 ]; then parts=" ${*:2} "; else parts=" operations models nccl sanitizer bench whole "; fi
part() { [[ "$parts" == *" $1 "* ]]; }
jobs=6
failures=0
table=()
export MOEYARD_LOG=warn

note() { # NAME OUTCOME DETAIL
    table+=("$(printf '%-44s %-5s %s' "$1" "$2" "$3")")
    if [ "$2" = FAIL ]; then failures=$((failures + 1)); fi
}
outcome() { # NAME STATUS DETAIL
    if [ "$2" = 0 ]; then note "$1" ok "$3"; else note "$1" FAIL "$3"; fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true

if ldd bin/moeyard | grep -E 'libcuda|libcudart|libnccl|libstdc'; then note "links no CUDA library" FAIL ""; else note "links no CUDA library" ok ""; fi

# A program that finds no GPU says why, and takes the CPU only where that was left to it.
CUDA_VISIBLE_DEVICES= bin/moeyard generate --device cuda models/demo-mixtral --prompt a >"$logs/no-gpu.txt" 2>&1
if [ $? = 2 ] && grep -q 'device: cuda: ' "$logs/no-gpu.txt"; then note "a missing GPU is named" ok "$(tail -1 "$logs/no-gpu.txt")"; else note "a missing GPU is named" FAIL "$(tail -1 "$logs/no-gpu.txt")"; fi

if part operations; then
    start=$SECONDS
    timeout 150 bin/gpu --test-threads 12 --skip kernels_agree --skip nccl:: --skip sticky:: >"$logs/operations.txt" 2>&1
    outcome "operations against the reference" $? "$(grep '^test result' "$logs/operations.txt"), $((SECONDS - start)) s"
    # By itself: it leaves its process without a GPU.
    timeout 60 bin/gpu --test-threads 1 sticky:: >"$logs/sticky.txt" 2>&1
    outcome "an illegal access is told and stays" $? "$(grep '^test result' "$logs/sticky.txt")"
    cat "$logs/sticky.txt" >>"$logs/operations.txt"
    # By themselves: a kernel that faults takes everything in its process with it.
    timeout 60 bin/gpu --test-threads 1 kernels_agree >"$logs/kernels.txt" 2>&1
    outcome "kernels of products against each other" $? "$(grep '^test result' "$logs/kernels.txt")"
    cat "$logs/kernels.txt" >>"$logs/operations.txt"
    grep -E 'FAILED|panicked|expected|^---- ' "$logs/operations.txt" | grep -v '^test .* ok$' | head -60
fi

# model, dtype, flags -> $logs/NAME.json
verify() { # NAME MODEL DTYPE FLAGS...
    local name="$1" model="$2" dtype="$3"
    shift 3
    timeout 60 bin/moeyard verify "$model" --prompts "$model/golden.json" --out "$logs/$name.json" --device cuda --dtype "$dtype" \
        --max-model-len 512 --kv-cache-memory 64MiB "$@" >"$logs/$name.log" 2>&1
}
judge() { # NAME MODEL DTYPE FLAGS...: verify, then compare with the golden outputs
    local name="$1" model="$2" dtype="$3"
    if verify "$@" && python3 fixtures/check_fixture.py "$model" "$logs/$name.json" --mode "$dtype" >"$logs/$name.txt" 2>&1; then
        echo ok >"$logs/$name.outcome"
    else
        { echo FAIL; tail -3 "$logs/$name.log" | tr '\n' ' '; grep -i fail "$logs/$name.txt" 2>/dev/null | head -3 | tr '\n' ' '; } >"$logs/$name.outcome"
    fi
}
throttle() { while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done; }

# Whether two dumps have the same bits: all logits of the prompts, and the log-probabilities of the tokens that followed.
same() { # NAME NAME
    cmp -s "$logs/$1.safetensors" "$logs/$2.safetensors" && python3 - "$logs/$1.json" "$logs/$2.json" <<'PY'
import json, sys
one, other = ([prompt.get("greedy") for prompt in json.load(open(path))["prompts"]] for path in sys.argv[1:])
sys.exit(one != other)
PY
}

names=()
divisions=("--expert-parallel-size 2" "--expert-parallel-size 4 --redundant-experts 4" "--expert-parallel-size 8 --redundant-experts 8 --split even" "--tensor-parallel-size 2" "--prefill-chunk-size 5 --max-num-seqs 2")
compact() { echo "$*" | tr -d ' '; }

# The trained demo models continue their golden prompts token by token.
demo() { # NAME MODEL FLAGS...
    local name="$1" model="$2"
    shift 2
    python3 - "$model/golden.json" "$logs/$name.prompts.json" <<'PY'
import json, sys
golden = json.load(open(sys.argv[1]))
case = lambda i, p: {"id": str(i), "input_ids": p["prompt_ids"], "all_logits": [], "greedy": {"tokens": p["f32_ids"]}}
json.dump({"schema": "moe-fixture-dump/1", "prompts": [case(i, p) for i, p in enumerate(golden["prompts"])]}, open(sys.argv[2], "w"))
PY
    if timeout 60 bin/moeyard verify "$model" --prompts "$logs/$name.prompts.json" --out "$logs/$name.json" --device cuda \
        --dtype f32 "$@" >"$logs/$name.log" 2>&1 &&
        python3 - "$model/golden.json" "$logs/$name.json" >"$logs/$name.txt" 2>&1 <<'PY'; then
import json, sys
golden, dump = (json.load(open(path))["prompts"] for path in sys.argv[1:])
assert len(golden) == len(dump) > 0
for want, found in zip(golden, dump):
    assert found["greedy"]["tokens"] == want["f32_ids"], (want["prompt"], want["f32_ids"], found["greedy"]["tokens"])
PY
        echo ok >"$logs/$name.outcome"
    else
        { echo FAIL; tail -q -n 1 "$logs/$name.log" "$logs/$name.txt" | tr '\n' ' '; } >"$logs/$name.outcome"
    fi
}

if part models; then
    start=$SECONDS
    for model in fixtures/*/; do
        model="${model%/}"
        [ -f "$model/golden.json" ] && [ -f "$model/config.json" ] || continue
        for dtype in f32 bf16; do
            name="$(basename "$model")-$dtype"
            names+=("$name")
            throttle
            judge "$name" "$model" "$dtype" &
        done
    done
    for model in fixtures/mixtral fixtures/deepseek_v3 fixtures/qwen2_moe; do
        for flags in "${divisions[@]}"; do
            name="$(compact "$(basename "$model")-f32$flags")"
            names+=("$name")
            throttle
            # shellcheck disable=SC2086
            judge "$name" "$model" f32 $flags &
        done
    done
    for model in models/*/; do
        model="${model%/}"
        for flags in "" "${divisions[@]}"; do
            name="$(compact "$(basename "$model")-f32$flags")"
            names+=("$name")
            throttle
            # shellcheck disable=SC2086
            demo "$name" "$model" $flags &
        done
    done
    wait
    for name in "${names[@]}"; do
        read -r first <"$logs/$name.outcome"
        note "$name" "${first:-FAIL}" "$(sed -n 2p "$logs/$name.outcome" | cut -c1-200)"
    done
    note "time of all models" ok "$((SECONDS - start)) s"

    # Placement, EP degree and chunks do not change a bit.
    for model in mixtral deepseek_v3 qwen2_moe demo-mixtral demo-deepseek; do
        for flags in "${divisions[@]}"; do
            case "$flags" in *tensor*) continue ;; esac
            same "$model-f32" "$(compact "$model-f32$flags")"
            outcome "$model: the bits of one rank with $flags" $? ""
        done
    done
fi

# NCCL: one rank through it on any version, several ranks on this GPU from 2.30 on, with the settings that its users give it there.
if part nccl; then
    if [ -z "${MOEYARD_NCCL_SO:-}" ]; then
        for file in "$PWD/libnccl.so.2" "$(python3 -c 'import nvidia.nccl as n; print(list(n.__path__)[0] + "/lib/libnccl.so.2")' 2>/dev/null)"; do
            if [ -f "$file" ]; then
                export MOEYARD_NCCL_SO="$file"
                break
            fi
        done
    fi
    export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=2 CUDA_DEVICE_MAX_CONNECTIONS=32 CUDA_MODULE_LOADING=EAGER
    start=$SECONDS
    timeout 120 bin/gpu --test-threads 1 nccl:: >"$logs/nccl.txt" 2>&1
    outcome "collectives of NCCL" $? "$(grep -m1 -E '^with NCCL|ignored: NCCL' "$logs/nccl.txt"); $(grep '^test result' "$logs/nccl.txt"), $((SECONDS - start)) s"
    grep -E 'FAILED|panicked|ignored: |^---- ' "$logs/nccl.txt" | head -40
    if [ -x bin/gpu_bench ]; then
        timeout 60 bin/gpu_bench exchanges 2>&1 | tee "$logs/exchanges.txt"
        outcome "exchanges between ranks on one GPU" "${PIPESTATUS[0]}" ""
    fi
    shares=$(cat "$logs/nccl.txt" "$logs/exchanges.txt" 2>/dev/null | grep -cE '^test nccl::shared.* ok$|^nccl, 2 ranks')
    for model in models/*/; do
        base="$(basename "$model")"
        [ -f "$model/golden.json" ] || continue
        [ -f "$logs/$base-f32.safetensors" ] || demo "$base-f32" "${model%/}"
        for ranks in 1 2 4; do
            name="$base-f32-nccl$ranks"
            if [ "$ranks" -gt 1 ] && [ "$shares" = 0 ]; then
                note "$name" skip "NCCL puts one rank on a GPU here"
                continue
            fi
            start=$SECONDS
            demo "$name" "${model%/}" --comm nccl --comm-timeout 20 --expert-parallel-size "$ranks"
            read -r first <"$logs/$name.outcome"
            note "$name" "$first" "$(sed -n 2p "$logs/$name.outcome" | cut -c1-200) $((SECONDS - start)) s"
            same "$base-f32" "$name"
            outcome "$base: the bits of one rank with NCCL between $ranks" $? ""
        done
    done
    unset NCCL_MULTI_RANK_GPU_ENABLE NCCL_NVLS_ENABLE NCCL_MAX_CTAS CUDA_DEVICE_MAX_CONNECTIONS CUDA_MODULE_LOADING
fi

# Out-of-bounds and uninitialised accesses, and races in shared memory, in whole models with attention of both kinds.
sanitize() { # TOOL MODEL FLAGS...
    local name tool="$1" model="$2"
    name="$1 $(basename "$2")${3:+ ${*:3}}"
    shift 2
    timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 9 bin/moeyard verify "$model" --prompts "$model/golden.json" \
        --out "$logs/$tool.json" --device cuda --dtype bf16 --max-model-len 256 --kv-cache-memory 16MiB "$@" >"$logs/$(compact "$name").txt" 2>&1
    outcome "$name" $? "$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$logs/$(compact "$name").txt" | head -1)"
}
if part sanitizer; then
    if command -v compute-sanitizer >/dev/null; then
        for model in fixtures/mixtral fixtures/deepseek_v3; do
            for tool in memcheck racecheck; do sanitize "$tool" "$model"; done
        done
        for tool in memcheck racecheck; do sanitize "$tool" fixtures/mixtral --expert-parallel-size 2; done
    else
        note "compute-sanitizer" skip "it is not here"
    fi
fi

# Models of real sizes with made-up weights: prefill and decode of the engine, and the share of what the memory allows.
whole() { # NAME FLAGS...
    local name="$1"
    shift
    start=$SECONDS
    if timeout 200 bin/moeyard bench "$logs/$name" --load-format dummy --device cuda --json "$logs/$name.json" "$@" >"$logs/$name.txt" 2>&1; then
        note "$name, whole" ok "$((SECONDS - start)) s"
        python3 - "$logs/$name/config.json" "$logs/$name.json" "${MOEYARD_COPY_GBS:-4150}" <<'PY' | tee -a "$logs/bench.txt"
import json, sys
config, found, copy = json.load(open(sys.argv[1])), json.load(open(sys.argv[2])), float(sys.argv[3])
hidden, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
experts = config.get("num_local_experts") or config["n_routed_experts"]
top_k, width = config["num_experts_per_tok"], config.get("moe_intermediate_size", config["intermediate_size"])
heads = config["num_attention_heads"]
dense = config.get("first_k_dense_replace", 0)
if "kv_lora_rank" in config:
    rank, q, rope, nope, v = (config[k] for k in ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    # The absorbed form reads both halves of kv_b once.
    attention = hidden * (q + rank + rope) + q * heads * (nope + rope) + heads * (nope + v) * rank + heads * v * hidden
else:
    dim, kv = config.get("head_dim") or hidden // heads, config["num_key_value_heads"]
    attention = hidden * dim * (heads + 2 * kv) + heads * dim * hidden
expert = 3 * hidden * width
shared = expert * config.get("n_shared_experts", 0) or 0
fixed = 2 * (layers * attention + dense * 3 * hidden * config["intermediate_size"] + (layers - dense) * shared + vocab * hidden)
fixed += 4 * (layers - dense) * experts * hidden
print(f"{'decode, whole model':<46} {'ms':>10} {'tokens/s':>10} {'GB/s':>10} {'of copy':>9}")
for row in found["decode"]:
    batch, ms = row["batch"], row["p50_ms"]
    # Distinct experts that random choices meet.
    distinct = experts * (1 - (1 - top_k / experts) ** batch)
    read = fixed + 2 * (layers - dense) * distinct * expert
    print(f"{'batch ' + str(batch):<46} {ms:>10.2f} {row['tokens_per_second']:>10.1f} {read / ms / 1e6:>10.0f} {read / ms / 1e4 / copy:>8.0f}%")
active = layers * attention + dense * 3 * hidden * config["intermediate_size"] + (layers - dense) * (top_k * expert + shared)
print(f"{'prefill, whole model':<46} {'ms':>10} {'tokens/s':>10} {'TFLOP/s':>10}")
for row in found["prefill"]:
    # Without attention's own products.
    tokens, ms = row["prompt_tokens"], row["p50_ms"]
    print(f"{str(tokens) + ' tokens':<46} {ms:>10.2f} {row['tokens_per_second']:>10.1f} {2 * active * tokens / ms / 1e9:>10.1f}")
PY
    else
        note "$name, whole" FAIL "$(tail -1 "$logs/$name.txt" | cut -c1-300)"
    fi
}
if part bench; then
    timeout 150 bin/gpu_bench 2>&1 | tee "$logs/bench.txt"
    outcome "benchmarks" "${PIPESTATUS[0]}" ""
    timeout 60 bin/gpu_bench worlds 2>&1 | tee -a "$logs/bench.txt"
    outcome "benchmarks of layers of several ranks" "${PIPESTATUS[0]}" ""
    timeout 120 bin/gpu_bench products 2>&1 | tee -a "$logs/bench.txt"
    outcome "benchmarks of all kernels of products" "${PIPESTATUS[0]}" ""
    # cuBLAS and a peer on the same card, where torch is at hand: the two products of the experts above, in loads drawn alike.
    timeout 60 python3 - <<'PY' 2>&1 | tee -a "$logs/bench.txt"
try:
    import torch
except ImportError:
    raise SystemExit("torch is not here: no cuBLAS figures")

# As bench does: the best of three runs of 0.15 s, long enough for the card to reach the clock it can keep.
def us(call):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    def run(calls):
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls
    run(1)
    calls = max(3, min(2000, int(150e3 / run(1))))
    return min(run(calls) for _ in range(3))

def random(*shape):
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).uniform_(-0.05, 0.05)

def report(name, micros, flops):
    print(f"{name:<46} {micros:>10.1f} {flops / micros / 1e6:>10.1f}")

for m, n, k in [(8192, 8192, 8192), (4096, 28672, 4096)]:
    x, w = random(m, k), random(n, k)
    report(f"cuBLAS {m} x {n} x {k}", us(lambda: torch.mm(x, w.t())), 2 * m * n * k)
if hasattr(torch, "_grouped_mm"):
    numbers = torch.Generator().manual_seed(7)
    for name, experts, hidden, width in [("Mixtral-8x7B", 8, 4096, 14336), ("DeepSeek-V3, EP 4", 64, 7168, 2048)]:
        gate_up, down = random(experts, 2 * width, hidden), random(experts, hidden, width)
        for tokens in (4096, 16384):
            rows = 2 * tokens
            x, y = random(rows, hidden), random(rows, width)
            for loads, spread in [("even", None), ("uniform", 0), ("log-normal", 1)]:
                counts = torch.full((experts,), rows // experts)
                if spread is not None:
                    odds = (torch.randn(experts, generator=numbers) * spread).exp()
                    counts = torch.bincount(torch.multinomial(odds, rows, replacement=True, generator=numbers), minlength=experts)
                offsets = counts.cumsum(0).to(device="cuda", dtype=torch.int32)
                both = lambda: (
                    torch._grouped_mm(x, gate_up.transpose(1, 2), offs=offsets),
                    torch._grouped_mm(y, down.transpose(1, 2), offs=offsets),
                )

                def experts_of(x):
                    gate, up = torch._grouped_mm(x, gate_up.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
                    return torch._grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(1, 2), offs=offsets)

                report(f"torch {name}, {tokens} tokens, {loads}", us(both), 6 * rows * hidden * width)
                report("  with the activation between", us(lambda: experts_of(x)), 6 * rows * hidden * width)
PY
fi

if part whole; then
    shape() { # MODEL NAME LAYERS: a copy of its configuration with so many layers
        mkdir -p "$logs/$2"
        sed "s/\"num_hidden_layers\": *[0-9]*/\"num_hidden_layers\": $3/" "configs/$1/config.json" >"$logs/$2/config.json"
    }
    large=(--max-model-len 10240 --max-num-batched-tokens 8192 --prefill-chunk-size 8192 --max-num-seqs 64 --repeat 3)
    shape mixtral-8x7b mixtral-8x7b 32
    whole mixtral-8x7b "${large[@]}" --prompt-len 2048,8192 --batch 1,8,64 --context-len 512 --steps 40
    shape deepseek-v3 deepseek-v3-of-6-layers 6
    whole deepseek-v3-of-6-layers "${large[@]}" --prompt-len 2048 --batch 1,64 --context-len 512 --steps 40
fi

printf '\n%s\n' "--- $(date -u +%F) $(nvidia-smi --query-gpu=name --format=csv,noheader | head -1)"
printf '%s\n' "${table[@]}"
if [ -f "$logs/bench.txt" ]; then printf '\n'; cat "$logs/bench.txt"; fi
echo "failures: $failures"
[ "$failures" = 0 ]
