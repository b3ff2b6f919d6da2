// The absorbed form of MLA on Hopper: single rows over latents of 512 and rotary keys of 64 columns in a paged bf16 cache, with the
// warpgroup instructions of sm_90a.
//
// A block works on 64 heads of one row. A tile of positions is read once into shared memory, where it is both the keys of all heads
// and, without its rotary part, their values. The first of two warpgroups computes scores and weights, while the second one
// issues the copies of the next tile; then each computes half of the columns of the values.
#include "attention_wgmma.cuh"
#include "merge.cuh"

using namespace moeyard;

namespace {

constexpr int HEADS = 64, LATENT = 512, ROPE = 64, WIDTH = LATENT + ROPE, PANELS = WIDTH / 64;
constexpr int GROUPS = 2, THREADS = GROUPS * 128;
constexpr int COLUMNS = LATENT / GROUPS;          // of a warpgroup's values
constexpr int STAGE_BYTES = PANELS * PANEL_BYTES, WEIGHT_BYTES = PANEL_BYTES;
constexpr int EXCHANGE_BYTES = 2 * HEADS * 4;     // maxima and sums
constexpr int SHARED_BYTES = 3 * STAGE_BYTES + WEIGHT_BYTES + EXCHANGE_BYTES + 1024;
constexpr int QUARTERS = COLUMNS / 8;             // float4 of the values per thread

// The second warpgroup copies tiles: a thread always the same piece of 16 bytes of every panel, of four positions.
struct Copies {
  static constexpr int COUNT = TILE / (128 / 8);
  const MoeyardAttention& a;
  const MoeyardSpan& span;
  int end, piece, row;
  int next[COUNT];  // blocks of the tile copied next

  __device__ Copies(const MoeyardAttention& a, const MoeyardSpan& span, int end) : a(a), span(span), end(end) {
    piece = threadIdx.x % 8, row = threadIdx.x % 128 / 8;
  }

  // Some time before `issue`, so that the block table does not hold up the copies.
  __device__ void look_up(int start) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      int position = start + row + i * (TILE / COUNT);
      next[i] = position < end ? look_up_block(a, span, position) : 0;
    }
  }

  __device__ void issue(int start, uint32_t to) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      int t = row + i * (TILE / COUNT);
      bool valid = start + t < end;
      int from = valid ? row_in_block(a, next[i], start + t) : 0;
      const bf16* latent = static_cast<const bf16*>(a.key[0].data) + from * a.key[0].stride + piece * 8;
      const bf16* rope = static_cast<const bf16*>(a.key[1].data) + from * a.key[1].stride + piece * 8;
#pragma unroll
      for (int p = 0; p < PANELS; ++p)
        copy_async(swizzled(to + p * PANEL_BYTES, t, piece), p < LATENT / 64 ? latent + p * 64 : rope, valid);
    }
  }
};

__device__ void fetch_queries(const MoeyardAttention& a, int64_t row, int first_head, uint32_t to) {
  constexpr int PIECES = WIDTH / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < HEADS * PIECES; i += THREADS) {
    int h = i / PIECES, piece = i % PIECES, part = piece >= LATENT / 8;
    int64_t head = first_head + h;
    uint4 x = {};
    if (head < a.heads) x = load_eight(a.query[part], row, head * a.query_stride[part] + piece * 8 - part * LATENT);
    store_shared(swizzled(to + piece / 8 * PANEL_BYTES, h, piece % 8), x);
  }
}

// What a block sums over earlier chunks, in global memory: it hardly leaves the second-level cache.
struct Totals {
  float4* at;
  bool any = false;

  __device__ Totals(const MoeyardAttention& a) {
    at = reinterpret_cast<float4*>(a.partials) + int64_t(blockIdx.x) * QUARTERS * THREADS + threadIdx.x;
  }
  __device__ float4 sum(int i, const float (&late)[4], const Factors (&f)[2]) const {
    float4 early = any ? at[i * THREADS] : float4{};
    return {joined(early.x, late[0], f[0]), joined(early.y, late[1], f[0]), joined(early.z, late[2], f[1]),
            joined(early.w, late[3], f[1])};
  }
};

__global__ void __launch_bounds__(THREADS, 1) attention(MoeyardAttention a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  int head_groups = (a.heads + HEADS - 1) / HEADS, index = int(blockIdx.x) / head_groups;
  int first_head = int(blockIdx.x) % head_groups * HEADS;
  const MoeyardSpan span = a.spans[index];
  int first = 0, end = int(span.position) + 1;
  if (a.chunks) {  // one chunk per block
    first = int(blockIdx.y) * CHUNK;
    if (first >= end) return;
    end = min(end, first + CHUNK);
  }
  int tiles = (end - first + TILE - 1) / TILE;
  uint32_t start_of_shared = shared_address(shared), base = (start_of_shared + 1023) / 1024 * 1024;
  uint32_t queries = base, stages = base + STAGE_BYTES, weights = stages + 2 * STAGE_BYTES;
  float* maxima = reinterpret_cast<float*>(shared + (weights + WEIGHT_BYTES - start_of_shared));
  float* sums = maxima + HEADS;

  int group = uniform(int(threadIdx.x) / 128), lane = threadIdx.x % WARP;
  Copies copies(a, span, end);
  if (group == 1) copies.look_up(first);
  start_in_turn();  // spans and the block table are no kernel's work
  if (group == 1) {
    copies.issue(first, stages);
    copy_commit();
    copies.look_up(first + TILE);
  }
  fetch_queries(a, span.row, first_head, queries);

  int head[2] = {int(threadIdx.x) % 128 / WARP * 16 + lane / 4, int(threadIdx.x) % 128 / WARP * 16 + lane / 4 + 8};
  Sight sight = {{0, 0}, {end - 1, end - 1}};
  float scale = a.scale * LOG2E;
  State total[2] = {nothing(), nothing()}, state[2] = {nothing(), nothing()};
  float out[COLUMNS / 8][4] = {};
  Totals totals(a);
  for (int t = 0; t < tiles; ++t) {
    copy_wait<0>();
    fence_for_wgmma();
    __syncthreads();
    int start = first + t * TILE;
    uint32_t stage = stages + t % 2 * STAGE_BYTES;
    if (group == 0) {
      float score[TILE / 8][4], top[2], at[2], sum[2][TILE / 16];
      uint64_t q = descriptor(queries), k = descriptor(stage);
      wgmma_begin();
      multiply_keys<true>(score, q, k);
#pragma unroll
      for (int step = 1; step < WIDTH / 16; ++step) {
        int at = step / 4 * (PANEL_BYTES >> 4) + step % 4 * 2;
        multiply_keys<false>(score, q + at, k + at);
      }
      wgmma_commit();
      wgmma_wait<0>();
      settle(score);
      if (start + TILE > end) hide(score, start, sight);
      highest(score, top);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[r] = fmaxf(state[r].max, top[r] * scale);
        at[r] = anchor(top[r]);
      }
      weigh(score, scale, at, sum);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float of_tile = whole(sum[r]);
        if (lane % 4 == 0) maxima[head[r]] = top[r], sums[head[r]] = of_tile;
#pragma unroll
        for (int j = 0; j < TILE / 8; ++j)
          store_shared(swizzled(weights, head[r], j) + lane % 4 * 4, pack(score[j][2 * r], score[j][2 * r + 1]));
      }
      fence_for_wgmma();
    } else {
      // Both warpgroups are done with the tile that these copies overwrite.
      if (t + 1 < tiles) copies.issue(start + TILE, stages + (t + 1) % 2 * STAGE_BYTES);
      copy_commit();
      copies.look_up(start + 2 * TILE);
    }
    __syncthreads();
    float keep[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = maxima[head[r]];
      keep[r] = power(state[r].max - anchor(top));
      state[r] = {top, fmaf(state[r].sum, keep[r], sums[head[r]])};
    }
    rescale(out, keep);

    uint64_t p = descriptor(weights), v = value_descriptor(stage + group * (COLUMNS / 64 * PANEL_BYTES));
    settle(out);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < TILE / 16; ++i) multiply_values(out, p + i * 2, v + i * (16 * 128 >> 4));
    wgmma_commit();
    wgmma_wait<0>();
    settle(out);
    // A chunk ends: it joins those before. What is left over at the end is joined below.
    if (!a.chunks && (start + TILE) % CHUNK == 0 && start + TILE < end) {
      Factors f[2] = {join(total[0], state[0]), join(total[1], state[1])};
#pragma unroll
      for (int i = 0; i < QUARTERS; ++i) {
        totals.at[i * THREADS] = totals.sum(i, out[i], f);
        out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
      }
      totals.any = true;
      state[0] = state[1] = nothing();
    }
  }

  int column = group * COLUMNS + lane % 4 * 2;
  if (a.chunks > 1) {  // leave this chunk for `merge`
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (first_head + head[r] >= a.heads) continue;
      float* to = partial<LATENT>(a, index, first_head + head[r], blockIdx.y);
#pragma unroll
      for (int d = 0; d < COLUMNS / 8; ++d)
        *reinterpret_cast<float2*>(to + column + d * 8) = {out[d][r * 2], out[d][r * 2 + 1]};
      if (group == 0 && lane % 4 == 0) *reinterpret_cast<float2*>(to + LATENT) = {state[r].max, state[r].sum};
    }
    return;
  }
  Factors f[2] = {join(total[0], state[0]), join(total[1], state[1])};
  float last[2] = {1.0f / total[0].sum, 1.0f / total[1].sum};
#pragma unroll
  for (int d = 0; d < COLUMNS / 8; ++d) {
    float4 value = totals.sum(d, out[d], f);
    int64_t at = int64_t(first_head) * LATENT + column + d * 8;
    if (first_head + head[0] < a.heads)
      store_pair(a.out, span.row, at + int64_t(head[0]) * LATENT, value.x * last[0], value.y * last[0]);
    if (first_head + head[1] < a.heads)
      store_pair(a.out, span.row, at + int64_t(head[1]) * LATENT, value.z * last[1], value.w * last[1]);
  }
#endif
}

}  // namespace

extern "C" int moeyard_attention_mla(const MoeyardAttention* a, void* stream) {
  if (a->span_count == 0) return 0;
  if (a->key[0].dim != LATENT || a->key[1].dim != ROPE || a->window || a->sinks) return int(cudaErrorInvalidValue);
  cudaError_t error = cudaFuncSetAttribute(attention, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  if (error) return int(error);
  dim3 grid(a->span_count * ((a->heads + HEADS - 1) / HEADS), a->chunks ? a->chunks : 1);
  int code = launch_early(attention, grid, THREADS, SHARED_BYTES, stream, *a);
  return code || a->chunks <= 1 ? code : merge_chunks<LATENT>(*a, stream);
}
