// Attention over a paged bf16 cache on the tensor cores: grouped queries with heads of 64 or 128, windows, sinks.
//
// A block works on up to 64 (row, query head) pairs that share a KV head. It walks the positions in tiles of 64 and keeps the
// softmax of every 512 positions apart, then merges these chunks in ascending order. All borders are absolute positions, so a pair's
// result does not depend on the rows beside it, on how a prompt was cut into steps, or on whether one block walked all chunks or
// each chunk had a block of its own (flash decoding, Dao et al. 2023), whose partial results `merge` then adds in the same order.
#include "mma.cuh"

using namespace moeyard;

namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP, UNITS = WARPS * 16, TILE = 64, CHUNK = 512;

// exp2 of a difference that is 0 or negative, -inf included.
__device__ inline float power(float x) { return exp2f(x); }
// The exponent's reference: a row that has seen nothing yet weighs everything by 0.
__device__ inline float anchor(float max) { return max == -INFINITY ? 0.0f : max; }

// A softmax in the making: maximum of the scores (times log2 e) and sum of the weights relative to it.
struct State {
  float max, sum;
};

// Factors by which two parts' values are multiplied when `late` joins `early`.
struct Factors {
  float early, late;
};

// Spelled out, lest the compiler fuses one product here and the other there.
__device__ inline float joined(float early, float late, Factors f) {
  return fmaf(early, f.early, __fmul_rn(late, f.late));
}

__device__ inline Factors join(State& early, State late) {
  float max = fmaxf(early.max, late.max), at = anchor(max);
  Factors f = {power(early.max - at), power(late.max - at)};
  early = {max, joined(early.sum, late.sum, f)};
  return f;
}

// 1 / sum with the sink, times what the sink's weight leaves of the values.
__device__ inline float last_factor(State s, const float* sinks, int head) {
  if (!sinks) return 1.0f / s.sum;
  constexpr float LOG2E = 1.4426950408889634f;
  float sink = sinks[head] * LOG2E, max = fmaxf(s.max, sink), keep = power(s.max - max);
  return keep / fmaf(s.sum, keep, power(sink - max));
}

template <int D> struct Layout {
  static constexpr int ROW_BYTES = D * 2, CHUNKS = D / 8;  // of a row in shared memory; 16-byte chunks
  static constexpr int TILE_BYTES = TILE * ROW_BYTES;
  static constexpr int VALUES = D / 8 * 4;  // floats of the output per lane
  static constexpr int TOTALS_BYTES = VALUES * THREADS * 4;
  // Two tiles of keys and of values; queries lie where the second tiles will, until they are in registers.
  static constexpr int SHARED_BYTES = 4 * TILE_BYTES + TOTALS_BYTES;
  static __device__ uint32_t at(uint32_t base, int row, int chunk) {
    return base + uint32_t(row) * ROW_BYTES + uint32_t((chunk ^ (row & 7)) * 16);
  }
};

template <int D>
__device__ void fetch(const MoeyardAttention& a, const MoeyardSpan& span, int kv_head, int start, int end, uint32_t keys,
                      uint32_t values) {
  using L = Layout<D>;
  const bf16* k = static_cast<const bf16*>(a.key[0].data) + int64_t(kv_head) * a.key[0].head_stride;
  const bf16* v = static_cast<const bf16*>(a.value.data) + int64_t(kv_head) * a.value.head_stride;
  int chunk = threadIdx.x % L::CHUNKS;
#pragma unroll
  for (int t = threadIdx.x / L::CHUNKS; t < TILE; t += THREADS / L::CHUNKS) {
    int position = start + t;
    bool valid = position < end;
    int64_t row = 0;
    if (valid)
      row = int64_t(a.block_table[span.first_block + position / a.block_size]) * a.block_size + position % a.block_size;
    copy_async(L::at(keys, t, chunk), k + row * a.key[0].stride + chunk * 8, valid);
    copy_async(L::at(values, t, chunk), v + row * a.value.stride + chunk * 8, valid);
  }
}

__device__ inline uint32_t pack(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}

template <int D> __global__ void __launch_bounds__(THREADS) attention(MoeyardAttention a) {
  using L = Layout<D>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const MoeyardSpan span = a.spans[blockIdx.x];
  int kv_head = blockIdx.y, group = a.heads / a.kv_heads, units = int(span.rows) * group;
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int first = a.window ? max(0, int(span.position) - a.window + 1) : 0, end = int(span.position + span.rows);
  if (a.chunks) {  // one chunk per block
    int chunk = first / CHUNK + int(blockIdx.z);
    if (chunk * CHUNK >= end) return;
    first = max(first, chunk * CHUNK);
    end = min(end, (chunk + 1) * CHUNK);
  }
  uint32_t base = shared_address(shared);
  uint32_t keys[2] = {base, base + 2 * L::TILE_BYTES}, values[2] = {base + L::TILE_BYTES, base + 3 * L::TILE_BYTES};
  float* totals = reinterpret_cast<float*>(shared + 4 * L::TILE_BYTES) + threadIdx.x;

  int start = first / TILE * TILE;
  fetch<D>(a, span, kv_head, start, end, keys[0], values[0]);
  copy_commit();
  // Queries, rounded to bf16.
  for (int i = threadIdx.x; i < UNITS * D / 2; i += THREADS) {
    int unit = i / (D / 2), d = i % (D / 2) * 2;
    float x = 0.0f, y = 0.0f;
    if (unit < units) {
      int64_t row = span.row + unit / group, col = int64_t(kv_head * group + unit % group) * a.query_stride[0] + d;
      x = load(a.query[0], row, col), y = load(a.query[0], row, col + 1);
    }
    uint32_t at = L::at(keys[1], unit, d / 8) + d % 8 * 2;
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(at), "r"(pack(x, y)));
  }
  __syncthreads();
  uint32_t query[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
    load_matrix_x4(query[i], L::at(keys[1], warp * 16 + lane % 16, i * 2 + lane / 16));

  // Of this lane's two pairs.
  int pair[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  int position[2], oldest[2];
  for (int r = 0; r < 2; ++r) {
    position[r] = pair[r] < units ? int(span.position) + pair[r] / group : -1;
    oldest[r] = a.window ? position[r] - a.window + 1 : 0;
  }
  bool working = warp * 16 < units;
  constexpr float LOG2E = 1.4426950408889634f;
  float scale = a.scale * LOG2E;
  State total[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}}, state[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
  float out[D / 8][4] = {};
  bool merged = false;
  for (int turn = 0; start < end; start += TILE, turn ^= 1) {
    copy_wait<0>();
    __syncthreads();
    if (start + TILE < end) fetch<D>(a, span, kv_head, start + TILE, end, keys[turn ^ 1], values[turn ^ 1]);
    copy_commit();
    if (!working) continue;
    float score[TILE / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
#pragma unroll
      for (int j = 0; j < TILE / 16; ++j) {
        uint32_t b[4];
        load_matrix_x4(b, L::at(keys[turn], j * 16 + lane / 16 * 8 + lane % 8, i * 2 + lane / 8 % 2));
        multiply_add(score[2 * j], query[i], b[0], b[1]);
        multiply_add(score[2 * j + 1], query[i], b[2], b[3]);
      }
    float top[2] = {state[0].max, state[1].max};
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int seen = start + j * 8 + lane % 4 * 2 + e % 2, r = e / 2;
        score[j][e] = seen <= position[r] && seen >= oldest[r] ? score[j][e] * scale : -INFINITY;
        top[r] = fmaxf(top[r], score[j][e]);
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(FULL, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(FULL, top[r], 2));
    }
    float at[2] = {anchor(top[0]), anchor(top[1])}, sum[2] = {0.0f, 0.0f};
    float keep[2] = {power(state[0].max - at[0]), power(state[1].max - at[1])};
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[j][e] = power(score[j][e] - at[e / 2]);
        sum[e / 2] += score[j][e];
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(FULL, sum[r], 1);
      sum[r] += __shfl_xor_sync(FULL, sum[r], 2);
      state[r] = {top[r], fmaf(state[r].sum, keep[r], sum[r])};
    }
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[d][e] *= keep[e / 2];
#pragma unroll
    for (int j = 0; j < TILE / 16; ++j) {
      uint32_t p[4] = {pack(score[2 * j][0], score[2 * j][1]), pack(score[2 * j][2], score[2 * j][3]),
                       pack(score[2 * j + 1][0], score[2 * j + 1][1]), pack(score[2 * j + 1][2], score[2 * j + 1][3])};
#pragma unroll
      for (int d = 0; d < D / 8; d += 2) {
        uint32_t v[4];
        load_matrix_x4_transposed(v, L::at(values[turn], j * 16 + lane / 8 % 2 * 8 + lane % 8, d + lane / 16));
        multiply_add(out[d], p, v[0], v[1]);
        multiply_add(out[d + 1], p, v[2], v[3]);
      }
    }
    // A chunk ends: it joins those before. What is left over at the end is joined below.
    if (!a.chunks && (start + TILE) % CHUNK == 0 && start + TILE < end) {
      Factors f[2] = {join(total[0], state[0]), join(total[1], state[1])};
#pragma unroll
      for (int i = 0; i < L::VALUES; ++i) {
        float before = merged ? totals[i * THREADS] : 0.0f;
        totals[i * THREADS] = joined(before, out[i / 4][i % 4], f[i / 2 % 2]);
        out[i / 4][i % 4] = 0.0f;
      }
      merged = true;
      state[0] = state[1] = {-INFINITY, 0.0f};
    }
  }
  if (!working) return;
  if (a.chunks) {  // leave this chunk for `merge`: values of D columns, then maximum and sum
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (pair[r] >= units) continue;
      int64_t unit = (int64_t(blockIdx.x) * a.heads + kv_head * group + pair[r] % group);
      float* to = a.partials + (unit * a.chunks + blockIdx.z) * (D + 2);
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
#pragma unroll
        for (int e = 0; e < 2; ++e) to[d * 8 + lane % 4 * 2 + e] = out[d][r * 2 + e];
      if (lane % 4 == 0) to[D] = state[r].max, to[D + 1] = state[r].sum;
    }
    return;
  }
  Factors f[2] = {join(total[0], state[0]), join(total[1], state[1])};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (pair[r] >= units) continue;
    int head = kv_head * group + pair[r] % group;
    int64_t row = span.row + pair[r] / group;
    float last = last_factor(total[r], a.sinks, head);
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int i = d * 4 + r * 2 + e;
        float before = merged ? totals[i * THREADS] : 0.0f;
        float value = joined(before, out[d][r * 2 + e], f[r]);
        store(a.out, row, int64_t(head) * D + d * 8 + lane % 4 * 2 + e, value * last);
      }
  }
}

// Joins the chunks of one row and head; a thread per column.
template <int D> __global__ void __launch_bounds__(D) merge(MoeyardAttention a) {
  const MoeyardSpan span = a.spans[blockIdx.x];
  int head = blockIdx.y, first = a.window ? max(0, int(span.position) - a.window + 1) : 0;
  int chunks = int(span.position) / CHUNK - first / CHUNK + 1;
  const float* from = a.partials + (int64_t(blockIdx.x) * a.heads + head) * a.chunks * (D + 2);
  State total = {-INFINITY, 0.0f};
  float value = 0.0f;
  for (int c = 0; c < chunks; ++c, from += D + 2) {
    Factors f = join(total, {from[D], from[D + 1]});
    value = joined(value, from[threadIdx.x], f);
  }
  store(a.out, span.row, int64_t(head) * D + threadIdx.x, value * last_factor(total, a.sinks, head));
}

template <int D> int launch(const MoeyardAttention& a, void* stream) {
  constexpr int BYTES = Layout<D>::SHARED_BYTES;
  cudaError_t error = cudaFuncSetAttribute(attention<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (error) return int(error);
  dim3 grid(a.span_count, a.kv_heads, a.chunks ? a.chunks : 1);
  attention<D><<<grid, THREADS, BYTES, stream_of(stream)>>>(a);
  if (a.chunks) merge<D><<<dim3(a.span_count, a.heads), D, 0, stream_of(stream)>>>(a);
  return launched();
}

}  // namespace

extern "C" int moeyard_attention_bf16(const MoeyardAttention* a, void* stream) {
  if (a->span_count == 0) return 0;
  switch (a->value.dim) {
    case 64: return launch<64>(*a, stream);
    case 128: return launch<128>(*a, stream);
    default: return int(cudaErrorInvalidValue);
  }
}
