// The absorbed form of MLA on Hopper: single rows over latents of 512 and rotary keys of 64 columns in a paged bf16 cache, with the
// warpgroup instructions of sm_90a.
//
// A block works on 64 heads of one row. A tile of positions is read once into shared memory, where it is both the keys of all heads
// and, without its rotary part, their values. One warpgroup, the scorer, computes scores and weights and a quarter of the values'
// columns; the other, the adder, the other columns, and it issues the copies. So the scorer works on a tile while the adder is at
// the one before.
#include "attention_wgmma.cuh"
#include "merge.cuh"
#include "roles.cuh"

using namespace moeyard;

namespace {

constexpr int HEADS = 64, LATENT = 512, ROPE = 64, WIDTH = LATENT + ROPE, PANELS = WIDTH / 64;
constexpr int GROUPS = 2, THREADS = GROUPS * 128;
constexpr int SCORER_COLUMNS = 128, ADDER_COLUMNS = 192;  // of the values; the adder has twice as many
constexpr int HELD = WIDTH / 16 / 2;                      // steps of 16 columns of the queries that the scorer keeps in registers
constexpr int STAGE_BYTES = PANELS * PANEL_BYTES, WEIGHT_BYTES = PANEL_BYTES;
constexpr int EXCHANGE_BYTES = 2 * HEADS * 4;  // maxima and sums
constexpr int SHARED_BYTES = 3 * STAGE_BYTES + WEIGHT_BYTES + EXCHANGE_BYTES + 1024;
// Named barriers. A tile has landed; its weights are there; the adder has read them; the scorer has added its values.
constexpr int LANDED = 1, WEIGHED = 2, READ = 3, ADDED = 4;

// The adder copies tiles: a thread always the same piece of 16 bytes of every panel, of four positions.
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

// A third of a thread's loads are under way at once.
__device__ void fetch_queries(const MoeyardAttention& a, int64_t row, int first_head, uint32_t to) {
  constexpr int PIECES = WIDTH / 8, AT_ONCE = HEADS * PIECES / THREADS / 3;
  static_assert(HEADS * PIECES % (3 * THREADS) == 0);
  for (int first = threadIdx.x; first < HEADS * PIECES; first += AT_ONCE * THREADS) {
    uint4 x[AT_ONCE];
    const void* from[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      int piece = (first + i * THREADS) % PIECES, part = piece >= LATENT / 8;
      int64_t head = first_head + (first + i * THREADS) / PIECES;
      int64_t column = head * a.query_stride[part] + piece * 8 - part * LATENT;
      from[i] = head < a.heads ? address_of(a.query[part], row, column) : nullptr;
    }
    load_eights(x, a.query[0].type, from);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      int h = (first + i * THREADS) / PIECES, piece = (first + i * THREADS) % PIECES;
      store_shared(swizzled(to + piece / 8 * PANEL_BYTES, h, piece % 8), x[i]);
    }
  }
}

// What both warpgroups know of a block's work.
struct Work {
  const MoeyardAttention& a;
  MoeyardSpan span;
  int index, first_head, first, end, tiles;
  uint32_t queries, stages, weights;
  float *maxima, *sums;

  __device__ Work(const MoeyardAttention& a, unsigned char* shared) : a(a) {
    int head_groups = (a.heads + HEADS - 1) / HEADS;
    index = int(blockIdx.x) / head_groups, first_head = int(blockIdx.x) % head_groups * HEADS;
    span = a.spans[index];
    first = 0, end = int(span.position) + 1;
    if (a.chunks) {  // one chunk per block
      first = int(blockIdx.y) * CHUNK;
      end = min(end, first + CHUNK);
    }
    tiles = (end - first + TILE - 1) / TILE;
    uint32_t start = shared_address(shared);
    queries = (start + 1023) / 1024 * 1024;
    stages = queries + STAGE_BYTES, weights = stages + 2 * STAGE_BYTES;
    maxima = reinterpret_cast<float*>(shared + (weights + WEIGHT_BYTES - start));
    sums = maxima + HEADS;
  }
  __device__ uint32_t stage(int t) const { return stages + t % 2 * STAGE_BYTES; }
  // Whether a chunk ends with tile t and another one follows.
  __device__ bool chunk_ends(int t) const { return !a.chunks && (first + (t + 1) * TILE) % CHUNK == 0 && t + 1 < tiles; }
};

// N columns of the values of two heads of a lane: of the chunk in registers, of those before it in global memory, which they
// hardly leave the second-level cache for.
template <int N> struct Values {
  static constexpr int QUARTERS = N / 8;
  float out[QUARTERS][4] = {};
  float4* totals;
  int column;

  // `before`: columns of the block whose totals come first.
  __device__ Values(const Work& work, int before) : column(before) {
    totals = reinterpret_cast<float4*>(work.a.partials) + (int64_t(blockIdx.x) * LATENT + before) * (HEADS / 4) + threadIdx.x % 128;
  }
  __device__ void add(const Work& work, int t) {
    uint64_t p = descriptor(work.weights), v = value_descriptor(work.stage(t) + column / 64 * PANEL_BYTES);
#pragma unroll
    for (int i = 0; i < TILE / 16; ++i) multiply_values(out, p + i * 2, v + i * (16 * 128 >> 4));
  }
  __device__ float4 sum(int i, bool any, const Factors (&f)[2]) const {
    float4 early = any ? totals[i * 128] : float4{};
    return {joined(early.x, out[i][0], f[0]), joined(early.y, out[i][1], f[0]), joined(early.z, out[i][2], f[1]),
            joined(early.w, out[i][3], f[1])};
  }
  __device__ void end_chunk(bool any, const Factors (&f)[2]) {
#pragma unroll
    for (int i = 0; i < QUARTERS; ++i) {
      totals[i * 128] = sum(i, any, f);
      out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
    }
  }
  // Leaves a chunk for `merge`.
  __device__ void leave(const Work& work, const int (&head)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (work.first_head + head[r] >= work.a.heads) continue;
      float* to = partial<LATENT>(work.a, work.index, work.first_head + head[r], blockIdx.y) + column + int(threadIdx.x) % 4 * 2;
#pragma unroll
      for (int d = 0; d < QUARTERS; ++d) *reinterpret_cast<float2*>(to + d * 8) = {out[d][r * 2], out[d][r * 2 + 1]};
    }
  }
  __device__ void finish(const Work& work, const int (&head)[2], bool any, const Factors (&f)[2], const float (&last)[2]) const {
#pragma unroll
    for (int d = 0; d < QUARTERS; ++d) {
      float4 value = sum(d, any, f);
      int64_t at = int64_t(work.first_head) * LATENT + column + d * 8 + int(threadIdx.x) % 4 * 2;
      if (work.first_head + head[0] < work.a.heads)
        store_pair(work.a.out, work.span.row, at + int64_t(head[0]) * LATENT, value.x * last[0], value.y * last[0]);
      if (work.first_head + head[1] < work.a.heads)
        store_pair(work.a.out, work.span.row, at + int64_t(head[1]) * LATENT, value.z * last[1], value.w * last[1]);
    }
  }
};

// Softmax of a lane's two heads, as both warpgroups follow it.
struct Softmax {
  int head[2];
  State total[2] = {nothing(), nothing()}, state[2] = {nothing(), nothing()};
  bool any = false;  // chunk before this one

  __device__ Softmax() {
    int warp = int(threadIdx.x) % 128 / WARP, lane = threadIdx.x % WARP;
    head[0] = warp * 16 + lane / 4, head[1] = head[0] + 8;
  }
  // What the scorer found of a tile; factors of earlier values.
  __device__ void follow(const Work& work, float (&keep)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = work.maxima[head[r]];
      keep[r] = power(state[r].max - anchor(top));
      state[r] = {top, fmaf(state[r].sum, keep[r], work.sums[head[r]])};
    }
  }
  __device__ void join_chunk(Factors (&f)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      f[r] = join(total[r], state[r]);
      state[r] = nothing();
    }
  }
};

template <class... V> __device__ inline void end_chunk(Softmax& softmax, V&... values) {
  Factors f[2];
  softmax.join_chunk(f);
  (values.end_chunk(softmax.any, f), ...);
  softmax.any = true;
}
template <class... V> __device__ inline void finish(const Work& work, Softmax& softmax, bool tells, const V&... values) {
  if (work.a.chunks > 1) {
    (values.leave(work, softmax.head), ...);
    if (!tells || threadIdx.x % 4) return;
    for (int r = 0; r < 2; ++r)
      if (work.first_head + softmax.head[r] < work.a.heads)
        *reinterpret_cast<float2*>(partial<LATENT>(work.a, work.index, work.first_head + softmax.head[r], blockIdx.y) + LATENT) = {
            softmax.state[r].max, softmax.state[r].sum};
    return;
  }
  Factors f[2];
  softmax.join_chunk(f);
  float last[2] = {1.0f / softmax.total[0].sum, 1.0f / softmax.total[1].sum};
  (values.finish(work, softmax.head, softmax.any, f, last), ...);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline void score_tiles(const Work& work) {
  int warp = uniform(int(threadIdx.x) / WARP), lane = threadIdx.x % WARP;
  uint32_t query[HELD][4];
#pragma unroll
  for (int i = 0; i < HELD; ++i)
    load_matrix_x4(query[i], swizzled(work.queries + i / 4 * PANEL_BYTES, warp * 16 + lane % 16, i % 4 * 2 + lane / 16));
  Sight sight = {{0, 0}, {work.end - 1, work.end - 1}};
  float scale = work.a.scale * LOG2E;
  Softmax softmax;
  Values<SCORER_COLUMNS> values(work, 0);
  for (int t = 0; t < work.tiles; ++t) {
    named_wait<THREADS>(LANDED);
    float score[TILE / 8][4], top[2], at[2], keep[2], sum[2][TILE / 16];
    uint64_t q = descriptor(work.queries), k = descriptor(work.stage(t));
    auto step_at = [](int step) { return step / 4 * (PANEL_BYTES >> 4) + step % 4 * 2; };
    wgmma_begin();
    multiply_keys<true>(score, query[0], k);
#pragma unroll
    for (int step = 1; step < HELD; ++step) multiply_keys<false>(score, query[step], k + step_at(step));
#pragma unroll
    for (int step = HELD; step < WIDTH / 16; ++step) multiply_keys<false>(score, q + step_at(step), k + step_at(step));
    wgmma_commit();
    wgmma_wait<0>();
    settle(score);
    int start = work.first + t * TILE;
    if (start + TILE > work.end) hide(score, start, sight);
    highest(score, top);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(softmax.state[r].max, top[r] * scale);
      at[r] = anchor(top[r]);
    }
    weigh(score, scale, at, sum);
    if (t > 0) named_wait<THREADS>(READ);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float of_tile = whole(sum[r]);
      if (lane % 4 == 0) work.maxima[softmax.head[r]] = top[r], work.sums[softmax.head[r]] = of_tile;
#pragma unroll
      for (int j = 0; j < TILE / 8; ++j)
        store_shared(swizzled(work.weights, softmax.head[r], j) + lane % 4 * 4, pack(score[j][2 * r], score[j][2 * r + 1]));
    }
    fence_for_wgmma();
    named_wait<THREADS>(WEIGHED);
    softmax.follow(work, keep);
    rescale(values.out, keep);
    settle(values.out);
    wgmma_begin();
    values.add(work, t);
    wgmma_commit();
    wgmma_wait<0>();
    settle(values.out);
    if (t + 1 < work.tiles) named_arrive<THREADS>(ADDED);
    if (work.chunk_ends(t)) end_chunk(softmax, values);
  }
  finish(work, softmax, true, values);
}

__device__ inline void add_tiles(const Work& work, Copies& copies) {
  Softmax softmax;
  Values<ADDER_COLUMNS> left(work, SCORER_COLUMNS), right(work, SCORER_COLUMNS + ADDER_COLUMNS);
  auto landed = [&]() __attribute__((always_inline)) {
    copy_wait<0>();
    fence_for_wgmma();
    named_arrive<THREADS>(LANDED);
  };
  landed();
  for (int t = 0; t < work.tiles; ++t) {
    bool more = t + 1 < work.tiles;
    if (t > 0) named_wait<THREADS>(ADDED);
    if (more) copies.issue(work.first + (t + 1) * TILE, work.stage(t + 1));
    copy_commit();
    copies.look_up(work.first + (t + 2) * TILE);
    named_wait<THREADS>(WEIGHED);
    float keep[2];
    softmax.follow(work, keep);
    rescale(left.out, keep);
    rescale(right.out, keep);
    settle(left.out);
    settle(right.out);
    wgmma_begin();
    left.add(work, t);
    right.add(work, t);
    wgmma_commit();
    if (more) landed();
    wgmma_wait<0>();
    settle(left.out);
    settle(right.out);
    if (more) named_arrive<THREADS>(READ);
    if (work.chunk_ends(t)) end_chunk(softmax, left, right);
  }
  finish(work, softmax, false, left, right);
}

#endif

__global__ void __launch_bounds__(THREADS, 1) attention(MoeyardAttention a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  Work work(a, shared);
  if (work.first >= work.end) return;
  bool adder = uniform(int(threadIdx.x) / 128) == 1;
  Copies copies(a, work.span, work.end);
  if (adder) copies.look_up(work.first);
  start_in_turn();  // spans and the block table are no kernel's work
  if (adder) {
    copies.issue(work.first, work.stages);
    copy_commit();
    copies.look_up(work.first + TILE);
  }
  fetch_queries(a, work.span.row, work.first_head, work.queries);
  fence_for_wgmma();
  __syncthreads();
  if (adder) add_tiles(work, copies);
  else score_tiles(work);
#endif
}

}  // namespace

extern "C" int moeyard_attention_mla(const MoeyardAttention* a, void* stream) {
  if (a->span_count == 0) return 0;
  if (a->key[0].dim != LATENT || a->key[1].dim != ROPE || a->window || a->sinks || a->query[0].type != a->query[1].type)
    return int(cudaErrorInvalidValue);
  if (cudaError_t error = allow(attention, SHARED_BYTES)) return int(error);
  dim3 grid(a->span_count * ((a->heads + HEADS - 1) / HEADS), a->chunks ? a->chunks : 1);
  int code = launch_early(attention, grid, THREADS, SHARED_BYTES, stream, *a);
  return code || a->chunks <= 1 ? code : merge_chunks<LATENT>(*a, stream);
}
