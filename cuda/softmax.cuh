// What the attention kernels over a bf16 cache share, so that they give a row the same bits: softmax over tiles of 64 positions,
// kept apart for every chunk of 512 and joined in ascending order. All borders are absolute positions, so a row's result does not
// depend on the rows beside it, on how a prompt was cut into steps, or on whether one block walked all chunks or each chunk had a
// block of its own (flash decoding, Dao et al. 2023).
//
// Scores lie in registers as the tensor cores leave them: lane l holds columns 8 j + l % 4 * 2 and the next one of rows l / 4
// (elements 0 and 1 of group j) and l / 4 + 8 (elements 2 and 3).
#pragma once
#include "mma.cuh"

namespace moeyard {

constexpr int TILE = 64, CHUNK = 512;

// A value that is the same in all lanes, as the compiler then knows.
__device__ inline int uniform(int x) { return __shfl_sync(FULL, x, 0); }

// 2^x; 0 for -inf and for what would be a denormal.
__device__ inline float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The exponent's reference: a row that has seen nothing yet weighs everything by 0.
__device__ inline float anchor(float max) { return max == -INFINITY ? 0.0f : max; }

// A softmax in the making: maximum of the scores (times log2 e) and sum of the weights relative to it.
struct State {
  float max, sum;
};
__device__ inline State nothing() { return {-INFINITY, 0.0f}; }

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

constexpr float LOG2E = 1.4426950408889634f;

// 1 / sum with the sink, times what the sink's weight leaves of the values.
__device__ inline float last_factor(State s, const float* sinks, int head) {
  if (!sinks) return 1.0f / s.sum;
  float sink = sinks[head] * LOG2E, max = fmaxf(s.max, sink), keep = power(s.max - max);
  return keep / fmaf(s.sum, keep, power(sink - max));
}

// What a lane's two rows may see: positions from `oldest` to `last`.
struct Sight {
  int oldest[2], last[2];
};

template <int N> __device__ inline void hide(float (&score)[N][4], int start, const Sight& sight) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int seen = start + j * 8 + int(threadIdx.x) % 4 * 2 + e % 2;
      if (seen < sight.oldest[e / 2] || seen > sight.last[e / 2]) score[j][e] = -INFINITY;
    }
}

// The largest score of both rows.
template <int N> __device__ inline void highest(const float (&score)[N][4], float (&top)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = fmaxf(score[0][2 * r], score[0][2 * r + 1]);
#pragma unroll
    for (int j = 1; j < N; ++j) top[r] = fmaxf(top[r], fmaxf(score[j][2 * r], score[j][2 * r + 1]));
    top[r] = fmaxf(top[r], __shfl_xor_sync(FULL, top[r], 1));
    top[r] = fmaxf(top[r], __shfl_xor_sync(FULL, top[r], 2));
  }
}

__device__ inline uint32_t pack(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}

// Scores become weights relative to `at`, rounded to bf16; this lane's sums of them, by 16 positions. `scale` is positive and includes
// log2 e. The sums are of the rounded weights, so that what is divided by them is a mean of values.
template <int N>
__device__ inline void weigh(float (&score)[N][4], float scale, const float (&at)[2], float (&sum)[2][N / 2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      float part[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* s = &score[2 * i + half][2 * r];
        uint32_t rounded = pack(power(fmaf(s[0], scale, -at[r])), power(fmaf(s[1], scale, -at[r])));
        s[0] = __uint_as_float(rounded << 16);
        s[1] = __uint_as_float(rounded & 0xffff0000u);
        part[half] = s[0] + s[1];
      }
      sum[r][i] = part[0] + part[1];
    }
}

// The sum over a tile, of a row's four lanes.
__device__ inline float whole(const float (&sum)[TILE / 16]) {
  static_assert(TILE / 16 == 4);
  float x = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  x += __shfl_xor_sync(FULL, x, 1);
  return x + __shfl_xor_sync(FULL, x, 2);
}

// A tile's scores become weights, and `state` includes them; what was summed before is to be multiplied by `keep`.
__device__ inline void weigh_tile(float (&score)[TILE / 8][4], float scale, State (&state)[2], float (&keep)[2]) {
  float top[2], at[2], sum[2][TILE / 16];
  highest(score, top);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = fmaxf(state[r].max, top[r] * scale);
    at[r] = anchor(top[r]);
    keep[r] = power(state[r].max - at[r]);
  }
  weigh(score, scale, at, sum);
#pragma unroll
  for (int r = 0; r < 2; ++r) state[r] = {top[r], fmaf(state[r].sum, keep[r], whole(sum[r]))};
}

// Most tiles do not raise a maximum.
template <int N> __device__ inline void rescale(float (&out)[N][4], const float (&keep)[2]) {
  if (!__any_sync(FULL, keep[0] != 1.0f || keep[1] != 1.0f)) return;
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) out[j][e] *= keep[e / 2];
}

// Weights of positions 16 i to 16 i + 15 as the first operand of a product.
template <int N> __device__ inline void operand(uint32_t (&p)[4], const float (&score)[N][4], int i) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    p[2 * half] = pack(score[2 * i + half][0], score[2 * i + half][1]);
    p[2 * half + 1] = pack(score[2 * i + half][2], score[2 * i + half][3]);
  }
}

// A paged cache: a position's block is looked up some time before its row is needed.
__device__ inline int block_index(const MoeyardAttention& a, int position) {
  int size = a.block_size;
  return (size & (size - 1)) == 0 ? position >> (31 - __clz(size)) : position / size;
}
__device__ inline int look_up_block(const MoeyardAttention& a, const MoeyardSpan& span, int position) {
  return int(a.block_table[span.first_block + block_index(a, position)]);
}
__device__ inline int row_in_block(const MoeyardAttention& a, int block, int position) {
  return (block - block_index(a, position)) * a.block_size + position;
}

// Where an element lies.
__device__ inline const void* address_of(const MoeyardMatrix& m, int64_t row, int64_t col) {
  return static_cast<const char*>(m.data) + (row * m.stride + col) * (m.type == MOEYARD_BF16 ? 2 : 4);
}
// Eight elements each from N 16-byte aligned places, rounded to bf16, or zeros from null. All loads are under way at once.
template <int N> __device__ inline void load_eights(uint4 (&x)[N], int type, const void* const (&from)[N]) {
  if (type == MOEYARD_BF16) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = from[i] ? *static_cast<const uint4*>(from[i]) : uint4{};
    return;
  }
  float4 low[N], high[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    low[i] = from[i] ? static_cast<const float4*>(from[i])[0] : float4{};
    high[i] = from[i] ? static_cast<const float4*>(from[i])[1] : float4{};
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    x[i] = {pack(low[i].x, low[i].y), pack(low[i].z, low[i].w), pack(high[i].x, high[i].y), pack(high[i].z, high[i].w)};
}
// Pairs of elements, each from an even column of such a matrix, rounded to bf16, or zeros from null. All loads are under way at once.
template <int N, int M> __device__ inline void load_pairs(uint32_t (&x)[N][M], int type, const void* const (&from)[N][M]) {
  if (type == MOEYARD_BF16) {
#pragma unroll
    for (int i = 0; i < N * M; ++i) x[i / M][i % M] = from[i / M][i % M] ? *static_cast<const uint32_t*>(from[i / M][i % M]) : 0;
    return;
  }
  float2 pair[N][M];
#pragma unroll
  for (int i = 0; i < N * M; ++i) pair[i / M][i % M] = from[i / M][i % M] ? *static_cast<const float2*>(from[i / M][i % M]) : float2{};
#pragma unroll
  for (int i = 0; i < N * M; ++i) x[i / M][i % M] = pack(pair[i / M][i % M].x, pair[i / M][i % M].y);
}
__device__ inline void store_pair(const MoeyardMatrix& m, int64_t row, int64_t col, float x, float y) {
  int64_t at = row * m.stride + col;
  if (m.type == MOEYARD_BF16) *reinterpret_cast<uint32_t*>(static_cast<bf16*>(m.data) + at) = pack(x, y);
  else *reinterpret_cast<float2*>(static_cast<float*>(m.data) + at) = {x, y};
}

}  // namespace moeyard
