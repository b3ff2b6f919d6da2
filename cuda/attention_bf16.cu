// Attention of several rows of a sequence over a paged bf16 cache on the tensor cores: grouped queries with heads of 64 or 128,
// windows, sinks. For GPUs without the warpgroup instructions of attention_sm90.cu.
//
// A block works on up to 64 (row, query head) pairs that share a KV head and walks all positions they see.
#include "softmax.cuh"

using namespace moeyard;

namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP, UNITS = WARPS * 16;

template <int D> struct Layout {
  static constexpr int ROW_BYTES = D * 2, PIECES = D / 8;  // of a row in shared memory; of 16 bytes
  static constexpr int TILE_BYTES = TILE * ROW_BYTES;
  static constexpr int VALUES = D / 8 * 4;  // floats of the output per lane
  static constexpr int TOTALS_BYTES = VALUES * THREADS * 4;
  // Two tiles of keys and of values; queries lie where the second tiles will, until they are in registers.
  static constexpr int SHARED_BYTES = 4 * TILE_BYTES + TOTALS_BYTES;
  static __device__ uint32_t at(uint32_t base, int row, int piece) {
    return base + uint32_t(row) * ROW_BYTES + uint32_t((piece ^ (row & 7)) * 16);
  }
};

template <int D>
__device__ void fetch(const MoeyardAttention& a, const MoeyardSpan& span, int kv_head, int start, int end, uint32_t keys) {
  using L = Layout<D>;
  const bf16* k = static_cast<const bf16*>(a.key[0].data) + int64_t(kv_head) * a.key[0].head_stride;
  const bf16* v = static_cast<const bf16*>(a.value.data) + int64_t(kv_head) * a.value.head_stride;
  int piece = threadIdx.x % L::PIECES;
#pragma unroll
  for (int t = threadIdx.x / L::PIECES; t < TILE; t += THREADS / L::PIECES) {
    int position = start + t;
    bool valid = position < end;
    int64_t row = valid ? row_in_block(a, look_up_block(a, span, position), position) : 0;
    copy_async(L::at(keys, t, piece), k + row * a.key[0].stride + piece * 8, valid);
    copy_async(L::at(keys + L::TILE_BYTES, t, piece), v + row * a.value.stride + piece * 8, valid);
  }
}

template <int D> __global__ void __launch_bounds__(THREADS) attention(MoeyardAttention a) {
  using L = Layout<D>;
  extern __shared__ __align__(1024) unsigned char shared[];
  // Blocks that run together share a KV head, and the second-level cache holds it. The last rows see most and start first.
  int kv_head = int(blockIdx.x) / a.span_count, piece = a.span_count - 1 - int(blockIdx.x) % a.span_count;
  const MoeyardSpan span = a.spans[piece];
  int group = a.heads / a.kv_heads, units = int(span.rows) * group;
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int first = a.window ? max(0, int(span.position) - a.window + 1) : 0, end = int(span.position + span.rows);
  uint32_t base = shared_address(shared);
  uint32_t second = base + 2 * L::TILE_BYTES;
  float* totals = reinterpret_cast<float*>(shared + 4 * L::TILE_BYTES) + threadIdx.x;

  int start = first / TILE * TILE;
  fetch<D>(a, span, kv_head, start, end, base);
  copy_commit();
  for (int i = threadIdx.x; i < UNITS * L::PIECES; i += THREADS) {
    int unit = i / L::PIECES, d = i % L::PIECES;
    int64_t row = int64_t(span.row) + unit / group, column = int64_t(kv_head * group + unit % group) * a.query_stride[0] + d * 8;
    const void* from[1] = {unit < units ? address_of(a.query[0], row, column) : nullptr};
    uint4 x[1];
    load_eights(x, a.query[0].type, from);
    store_shared(L::at(second, unit, d), x[0]);
  }
  __syncthreads();
  uint32_t query[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
    load_matrix_x4(query[i], L::at(second, warp * 16 + lane % 16, i * 2 + lane / 16));

  // Of this lane's two pairs.
  int pair[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  Sight sight;
  for (int r = 0; r < 2; ++r) {
    sight.last[r] = pair[r] < units ? int(span.position) + pair[r] / group : -1;
    sight.oldest[r] = a.window ? sight.last[r] - a.window + 1 : 0;
  }
  bool working = warp * 16 < units;
  float scale = a.scale * LOG2E;
  State total[2] = {nothing(), nothing()}, state[2] = {nothing(), nothing()};
  float out[D / 8][4] = {};
  bool merged = false;
  for (int turn = 0; start < end; start += TILE, turn ^= 1) {
    copy_wait<0>();
    __syncthreads();
    uint32_t keys = turn ? second : base, values = keys + L::TILE_BYTES;
    if (start + TILE < end) fetch<D>(a, span, kv_head, start + TILE, end, turn ? base : second);
    copy_commit();
    if (!working) continue;
    float score[TILE / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
#pragma unroll
      for (int j = 0; j < TILE / 16; ++j) {
        uint32_t b[4];
        load_matrix_x4(b, L::at(keys, j * 16 + lane / 16 * 8 + lane % 8, i * 2 + lane / 8 % 2));
        multiply_add(score[2 * j], query[i], b[0], b[1]);
        multiply_add(score[2 * j + 1], query[i], b[2], b[3]);
      }
    if (start + TILE - 1 > int(span.position) || (a.window && start <= end - 1 - a.window)) hide(score, start, sight);
    float keep[2];
    weigh_tile(score, scale, state, keep);
    rescale(out, keep);
#pragma unroll
    for (int j = 0; j < TILE / 16; ++j) {
      uint32_t p[4];
      operand(p, score, j);
#pragma unroll
      for (int d = 0; d < D / 8; d += 2) {
        uint32_t v[4];
        load_matrix_x4_transposed(v, L::at(values, j * 16 + lane / 8 % 2 * 8 + lane % 8, d + lane / 16));
        multiply_add(out[d], p, v[0], v[1]);
        multiply_add(out[d + 1], p, v[2], v[3]);
      }
    }
    // A chunk ends: it joins those before. What is left over at the end is joined below.
    if ((start + TILE) % CHUNK == 0 && start + TILE < end) {
      Factors f[2] = {join(total[0], state[0]), join(total[1], state[1])};
#pragma unroll
      for (int i = 0; i < L::VALUES; ++i) {
        float before = merged ? totals[i * THREADS] : 0.0f;
        totals[i * THREADS] = joined(before, out[i / 4][i % 4], f[i / 2 % 2]);
        out[i / 4][i % 4] = 0.0f;
      }
      merged = true;
      state[0] = state[1] = nothing();
    }
  }
  if (!working) return;
  Factors f[2] = {join(total[0], state[0]), join(total[1], state[1])};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (pair[r] >= units) continue;
    int head = kv_head * group + pair[r] % group;
    int64_t row = span.row + pair[r] / group;
    float last = last_factor(total[r], a.sinks, head);
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      float value[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float before = merged ? totals[(d * 4 + r * 2 + e) * THREADS] : 0.0f;
        value[e] = joined(before, out[d][r * 2 + e], f[r]) * last;
      }
      store_pair(a.out, row, int64_t(head) * D + d * 8 + lane % 4 * 2, value[0], value[1]);
    }
  }
}

template <int D> int launch(const MoeyardAttention& a, void* stream) {
  constexpr int BYTES = Layout<D>::SHARED_BYTES;
  if (cudaError_t error = allow(attention<D>, BYTES)) return int(error);
  attention<D><<<a.span_count * a.kv_heads, THREADS, BYTES, stream_of(stream)>>>(a);
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
