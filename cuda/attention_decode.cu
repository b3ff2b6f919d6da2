// Attention of single rows over a paged bf16 cache on the tensor cores: grouped queries with heads of 64 or 128, windows, sinks.
//
// A block takes one chunk of 512 positions for one KV head and up to 16 of its query heads. Keys and values are read once, three
// tiles deep, or six where there are few blocks. Of a tile each of four warps computes the scores of 16 positions, and the values of a
// quarter of the columns; in between they exchange maxima, sums and weights through shared memory.
#include "merge.cuh"

using namespace moeyard;

namespace {

constexpr int WARPS = TILE / 16, THREADS = WARPS * WARP, UNITS = 16;

// What warps tell each other of a tile.
struct Exchange {
  uint4 weights[WARPS][WARP];  // of a warp's positions, by lane
  float2 sums[WARPS][WARP];    // of both rows
  float maxima[WARPS][UNITS];
};

template <int D_, int STAGES_> struct Shape {
  static constexpr int D = D_, STAGES = STAGES_;
  static constexpr int PIECES = D / 8;  // of 16 bytes in a row
  static constexpr int TILE_BYTES = TILE * D * 2, STAGE_BYTES = 2 * TILE_BYTES;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + int(sizeof(Exchange));
  static constexpr int COLUMNS = D / WARPS;
  static __device__ uint32_t at(uint32_t base, int row, int piece) {
    return base + uint32_t(row) * (D * 2) + uint32_t((piece ^ (row & 7)) * 16);
  }
};

// A warp's share of the copies of a tile: 16 rows, of which the block copies WARPS * AT_ONCE at a time.
template <class S> struct Copies {
  static constexpr int AT_ONCE = WARP / S::PIECES, TIMES = TILE / (WARPS * AT_ONCE);
  const MoeyardAttention& a;
  const MoeyardSpan& span;
  const bf16* keys;
  int64_t to_values;  // bytes from a key to its value
  int end;

  __device__ Copies(const MoeyardAttention& a, const MoeyardSpan& span, int kv_head, int end) : a(a), span(span), end(end) {
    int piece = threadIdx.x % S::PIECES;
    keys = static_cast<const bf16*>(a.key[0].data) + int64_t(kv_head) * a.key[0].head_stride + piece * 8;
    to_values = static_cast<const char*>(a.value.data) - static_cast<const char*>(a.key[0].data);
  }

  __device__ static int row_in_tile(int i) {
    int warp = threadIdx.x / WARP;
    return i / AT_ONCE * WARPS * AT_ONCE + warp * AT_ONCE + i % AT_ONCE;
  }

  // The block of the cache of this warp's row l % 16 in a tile, for lane l. Some time before `issue`, so that the block table does not hold
  // up the copies.
  __device__ int look_up(int start) const {
    int position = start + row_in_tile(threadIdx.x % 16);
    return position < end ? look_up_block(a, span, position) : 0;
  }

  __device__ void issue(int start, int block, uint32_t stage) const {
    int lane = threadIdx.x % WARP, position = start + row_in_tile(lane % 16);
    int row = position < end ? row_in_block(a, block, position) : 0;
#pragma unroll
    for (int i = 0; i < TIMES; ++i) {
      int own = i * AT_ONCE + lane / S::PIECES, t = row_in_tile(own);
      const bf16* key = keys + __shfl_sync(FULL, row, own) * a.key[0].stride;
      bool valid = start + t < end;
      copy_async(S::at(stage, t, lane % S::PIECES), key, valid);
      copy_async(S::at(stage + S::TILE_BYTES, t, lane % S::PIECES), reinterpret_cast<const char*>(key) + to_values, valid);
    }
  }
};

template <class S> __global__ void __launch_bounds__(THREADS) attention(MoeyardAttention a) {
  constexpr int D = S::D, STAGES = S::STAGES;
  extern __shared__ __align__(1024) unsigned char shared[];
  Exchange& exchange = *reinterpret_cast<Exchange*>(shared + STAGES * S::STAGE_BYTES);
  const MoeyardSpan span = a.spans[blockIdx.x];
  int group = a.heads / a.kv_heads, tiles_of_units = (group + UNITS - 1) / UNITS;
  int kv_head = blockIdx.y / tiles_of_units, first_unit = blockIdx.y % tiles_of_units * UNITS;
  int position = int(span.position), oldest = first_seen(a, span);
  int chunk = oldest / CHUNK + int(blockIdx.z);
  if (chunk * CHUNK > position) return;
  int first = max(oldest, chunk * CHUNK) / TILE * TILE, end = min(position + 1, (chunk + 1) * CHUNK);
  int tiles = (end - first + TILE - 1) / TILE;
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  uint32_t base = shared_address(shared);

  Copies<S> copies(a, span, kv_head, end);
  int blocks[STAGES];
#pragma unroll
  for (int t = 0; t < STAGES; ++t) blocks[t] = copies.look_up(first + t * TILE);
  start_in_turn();  // spans and the block table are no kernel's work
#pragma unroll
  for (int t = 0; t < STAGES - 1; ++t) {
    if (t < tiles) copies.issue(first + t * TILE, blocks[t], base + t * S::STAGE_BYTES);
    copy_commit();
  }
  int block = blocks[STAGES - 1];  // of the tile copied next

  int unit[2] = {first_unit + lane / 4, first_unit + lane / 4 + 8};
  uint32_t query[D / 16][4];
  const void* pairs[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int head = kv_head * group + unit[e % 2], d = i * 16 + e / 2 * 8 + lane % 4 * 2;
      pairs[i][e] = unit[e % 2] < group ? address_of(a.query[0], span.row, int64_t(head) * a.query_stride[0] + d) : nullptr;
    }
  load_pairs(query, a.query[0].type, pairs);

  Sight sight = {{oldest, oldest}, {position, position}};
  float scale = a.scale * LOG2E;
  State state[2] = {nothing(), nothing()};
  float out[S::COLUMNS / 8][4] = {};
  for (int t = 0; t < tiles; ++t) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    int ahead = t + STAGES - 1, start = first + t * TILE;
    if (ahead < tiles) copies.issue(first + ahead * TILE, block, base + ahead % STAGES * S::STAGE_BYTES);
    copy_commit();
    block = copies.look_up(first + (ahead + 1) * TILE);
    uint32_t keys = base + t % STAGES * S::STAGE_BYTES, values = keys + S::TILE_BYTES;
    float score[2][4] = {}, top[2], at[2], keep[2], sum[2][1];
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      uint32_t b[4];
      load_matrix_x4(b, S::at(keys, warp * 16 + lane / 16 * 8 + lane % 8, i * 2 + lane / 8 % 2));
      multiply_add(score[0], query[i], b[0], b[1]);
      multiply_add(score[1], query[i], b[2], b[3]);
    }
    if (start < oldest || start + TILE > end) hide(score, start + warp * 16, sight);
    highest(score, top);
    if (lane % 4 == 0) exchange.maxima[warp][lane / 4] = top[0], exchange.maxima[warp][lane / 4 + 8] = top[1];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = exchange.maxima[0][lane / 4 + 8 * r];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) top[r] = fmaxf(top[r], exchange.maxima[w][lane / 4 + 8 * r]);
      top[r] = fmaxf(state[r].max, top[r] * scale);
      at[r] = anchor(top[r]);
      keep[r] = power(state[r].max - at[r]);
    }
    weigh(score, scale, at, sum);
    uint32_t own[4];
    operand(own, score, 0);
    exchange.weights[warp][lane] = {own[0], own[1], own[2], own[3]};
    exchange.sums[warp][lane] = {sum[0][0], sum[1][0]};
    __syncthreads();
    float sums[2][WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      float2 both = exchange.sums[w][lane];
      sums[0][w] = both.x, sums[1][w] = both.y;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) state[r] = {top[r], fmaf(state[r].sum, keep[r], whole(sums[r]))};
    rescale(out, keep);
#pragma unroll
    for (int j = 0; j < TILE / 16; ++j) {
      uint4 weights = exchange.weights[j][lane];
      uint32_t p[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
      for (int d = 0; d < S::COLUMNS / 8; d += 2) {
        uint32_t v[4];
        int piece = warp * (S::COLUMNS / 8) + d + lane / 16;
        load_matrix_x4_transposed(v, S::at(values, j * 16 + lane / 8 % 2 * 8 + lane % 8, piece));
        multiply_add(out[d], p, v[0], v[1]);
        multiply_add(out[d + 1], p, v[2], v[3]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (unit[r] >= group) continue;
    int head = kv_head * group + unit[r], column = warp * S::COLUMNS + lane % 4 * 2;
    if (a.chunks > 1) {
      float* to = partial<D>(a, blockIdx.x, head, blockIdx.z);
#pragma unroll
      for (int d = 0; d < S::COLUMNS / 8; ++d)
        *reinterpret_cast<float2*>(to + column + d * 8) = {out[d][r * 2], out[d][r * 2 + 1]};
      if (warp == 0 && lane % 4 == 0) *reinterpret_cast<float2*>(to + D) = {state[r].max, state[r].sum};
      continue;
    }
    // The only chunk: joining it to nothing changes no bit.
    float last = last_factor(state[r], a.sinks, head);
#pragma unroll
    for (int d = 0; d < S::COLUMNS / 8; ++d)
      store_pair(a.out, span.row, int64_t(head) * D + column + d * 8, out[d][r * 2] * last, out[d][r * 2 + 1] * last);
  }
}

template <class S> int launch(const MoeyardAttention& a, dim3 grid, void* stream) {
  if (cudaError_t error = allow(attention<S>, S::SHARED_BYTES)) return int(error);
  int code = launch_early(attention<S>, grid, THREADS, S::SHARED_BYTES, stream, a);
  return code || a.chunks == 1 ? code : merge_chunks<S::D>(a, stream);
}

// A block that has a multiprocessor to itself may have its shared memory too, where there is enough: then most of a chunk is under way at once.
template <int D> int launch(const MoeyardAttention& a, void* stream) {
  int group = a.heads / a.kv_heads;
  dim3 grid(a.span_count, a.kv_heads * ((group + UNITS - 1) / UNITS), a.chunks);
  bool few = int64_t(grid.x) * grid.y * grid.z <= MULTIPROCESSORS && Shape<D, 6>::SHARED_BYTES <= most_shared();
  return few ? launch<Shape<D, 6>>(a, grid, stream) : launch<Shape<D, 3>>(a, grid, stream);
}

}  // namespace

extern "C" int moeyard_attention_decode(const MoeyardAttention* a, void* stream) {
  if (a->span_count == 0) return 0;
  switch (a->value.dim) {
    case 64: return launch<64>(*a, stream);
    case 128: return launch<128>(*a, stream);
    default: return int(cudaErrorInvalidValue);
  }
}
