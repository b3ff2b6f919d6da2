// Attention of several rows of a sequence on Hopper, with the warpgroup instructions of sm_90a: grouped queries over the paged cache
// with heads of 64 or 128, windows, sinks; and the expanded form of MLA, whose keys are 128 columns of rows in order of position
// and 64 of the paged cache. A row has the bits that attention_bf16.cu and attention_decode.cu give it.
//
// A block works on 128 (row, query head) pairs that share a KV head, 64 for each of two warpgroups, and walks all positions they see;
// a third warpgroup copies keys and values. The two take turns to issue products: while one's scores become weights, the tensor
// cores work for the other (the schedule of FlashAttention-3, Shah et al. 2024).
#include "attention_wgmma.cuh"
#include "roles.cuh"
#include "softmax.cuh"

using namespace moeyard;

namespace {

constexpr int GROUPS = 2, UNITS = GROUPS * 64, WORKERS = GROUPS * 128, COPIERS = 128, THREADS = COPIERS + WORKERS;
constexpr int COPIER_REGISTERS = 56, WORKER_REGISTERS = 224;
// Tiles of keys, and of values, in shared memory.
constexpr int STAGES = 4;
// Named barriers: of the workers, and a turn of each of their warpgroups.
constexpr int ALL_WORKERS = 1, TURN = 2;

// Widths of keys and values.
template <int KEY, int VALUE> struct Shape {
  static constexpr bool EXPANDED = KEY != VALUE;
  static constexpr int KEY_BYTES = KEY / 64 * PANEL_BYTES, VALUE_BYTES = VALUE / 64 * PANEL_BYTES;
  static constexpr int VALUES = VALUE / 2;  // floats of the output per worker
  // Queries, until they are in registers; then what is summed over chunks.
  static constexpr int QUERY_BYTES = GROUPS * KEY_BYTES, SUM_BYTES = VALUES * WORKERS * 4;
  static constexpr int PHASE_BYTES = 4 * STAGES * 8;
  static constexpr int SHARED_BYTES =
      (QUERY_BYTES > SUM_BYTES ? QUERY_BYTES : SUM_BYTES) + STAGES * (KEY_BYTES + VALUE_BYTES) + PHASE_BYTES + 1024;
};

// Where a block keeps what: queries and sums, then tiles of keys and of values, each with a phase "full" and one "empty".
template <int KEY, int VALUE> struct Layout {
  using S = Shape<KEY, VALUE>;
  uint32_t queries, tiles_of_keys, tiles_of_values, phases;
  __device__ explicit Layout(uint32_t shared) {
    queries = (shared + 1023) / 1024 * 1024;
    tiles_of_keys = queries + (S::QUERY_BYTES > S::SUM_BYTES ? S::QUERY_BYTES : S::SUM_BYTES);
    tiles_of_values = tiles_of_keys + STAGES * S::KEY_BYTES;
    phases = tiles_of_values + STAGES * S::VALUE_BYTES;
  }
  __device__ uint32_t keys(int t) const { return tiles_of_keys + t % STAGES * S::KEY_BYTES; }
  __device__ uint32_t values(int t) const { return tiles_of_values + t % STAGES * S::VALUE_BYTES; }
  __device__ uint32_t keys_full(int t) const { return phases + t % STAGES * 8; }
  __device__ uint32_t keys_empty(int t) const { return phases + (STAGES + t % STAGES) * 8; }
  __device__ uint32_t values_full(int t) const { return phases + (2 * STAGES + t % STAGES) * 8; }
  __device__ uint32_t values_empty(int t) const { return phases + (3 * STAGES + t % STAGES) * 8; }
  // Of the phase in which tile t is there.
  __device__ static int parity(int t) { return t / STAGES % 2; }
  __device__ void init() const {
    for (int t = 0; t < STAGES; ++t) {
      phase_init(keys_full(t), COPIERS), phase_init(values_full(t), COPIERS);
      phase_init(keys_empty(t), WORKERS / WARP), phase_init(values_empty(t), WORKERS / WARP);
    }
  }
};

// A copier's share of a tile: the same piece of 16 bytes of four rows in every panel.
template <int KEY, int VALUE> struct Copies {
  using S = Shape<KEY, VALUE>;
  static constexpr int APART = COPIERS / 8, COUNT = TILE / APART;
  const MoeyardAttention& a;
  const MoeyardSpan& span;
  const bf16 *keys, *rope, *values;
  int end, piece, row;
  int next[COUNT], paged[COUNT];  // blocks of the tile of keys copied next, cache rows of the one copied last

  __device__ Copies(const MoeyardAttention& a, const MoeyardSpan& span, int kv_head, int end) : a(a), span(span), end(end) {
    piece = threadIdx.x % 8, row = threadIdx.x / 8;
    auto start = [&](const MoeyardKvPart& part) {
      const bf16* from = static_cast<const bf16*>(part.data) + int64_t(kv_head) * part.head_stride + piece * 8;
      return part.paged ? from : from + int64_t(span.base) * part.stride;
    };
    keys = start(a.key[0]), rope = start(a.key[1]), values = start(a.value);
  }

  template <int PANELS>
  __device__ void copy(const bf16* from, int64_t stride, int i, int at, bool valid, uint32_t to) {
    const bf16* source = from + at * stride;
#pragma unroll
    for (int p = 0; p < PANELS; ++p)
      copy_async(swizzled(to + p * PANEL_BYTES, row + i * APART, piece), source + p * 64, valid);
  }

  // Some time before `issue_keys`, so that the block table does not hold up the copies.
  __device__ void look_up(int start) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      int position = start + row + i * APART;
      next[i] = position < end ? look_up_block(a, span, position) : 0;
    }
  }

  __device__ void issue_keys(int start, uint32_t to) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      int position = start + row + i * APART;
      bool valid = position < end;
      paged[i] = valid ? row_in_block(a, next[i], position) : 0;
      if constexpr (S::EXPANDED) {
        copy<KEY / 64 - 1>(keys, a.key[0].stride, i, valid ? position : 0, valid, to);
        copy<1>(rope, a.key[1].stride, i, paged[i], valid, to + (KEY / 64 - 1) * PANEL_BYTES);
      } else {
        copy<KEY / 64>(keys, a.key[0].stride, i, paged[i], valid, to);
      }
    }
  }

  // Of the tile whose keys were copied last.
  __device__ void issue_values(int start, uint32_t to) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      int position = start + row + i * APART;
      bool valid = position < end;
      copy<VALUE / 64>(values, a.value.stride, i, S::EXPANDED ? (valid ? position : 0) : paged[i], valid, to);
    }
  }
};

// What the copiers do: keys and values in turn, two tiles of both under way.
template <int KEY, int VALUE>
__device__ void copy_tiles(Copies<KEY, VALUE>& copies, const Layout<KEY, VALUE>& at, int first, int tiles) {
  auto landed = [](uint32_t full) {
    fence_for_wgmma();
    phase_arrive(full);
  };
  copies.look_up(first);
  for (int t = 0; t < tiles; ++t) {
    if (t >= STAGES) phase_wait(at.keys_empty(t), at.parity(t - STAGES));
    copies.issue_keys(first + t * TILE, at.keys(t));
    copy_commit();
    copies.look_up(first + (t + 1) * TILE);
    copy_wait<4>();
    if (t >= 2) landed(at.keys_full(t - 2));
    if (t >= STAGES) phase_wait(at.values_empty(t), at.parity(t - STAGES));
    copies.issue_values(first + t * TILE, at.values(t));
    copy_commit();
    copy_wait<4>();
    if (t >= 2) landed(at.values_full(t - 2));
  }
  copy_wait<2>();
  if (tiles >= 2) {
    landed(at.keys_full(tiles - 2));
    landed(at.values_full(tiles - 2));
  }
  copy_wait<0>();
  landed(at.keys_full(tiles - 1));
  landed(at.values_full(tiles - 1));
}

// The queries' columns come in two parts where the keys do. All of a worker's loads are under way at once, or half of them.
template <int KEY, int VALUE>
__device__ void fetch_queries(const MoeyardAttention& a, const MoeyardSpan& span, int kv_head, uint32_t to) {
  constexpr int PIECES = KEY / 8, COUNT = UNITS * PIECES / WORKERS, AT_ONCE = COUNT < 8 ? COUNT : COUNT / 2;
  static_assert(UNITS * PIECES % WORKERS == 0);
  int group = a.heads / a.kv_heads, units = int(span.rows) * group;
  for (int first = int(threadIdx.x) - COPIERS; first < UNITS * PIECES; first += AT_ONCE * WORKERS) {
    uint4 x[AT_ONCE];
    const void* from[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      int unit = (first + i * WORKERS) / PIECES, column = (first + i * WORKERS) % PIECES * 8, part = column >= a.key[0].dim;
      int64_t row = int64_t(span.row) + unit / group, head = kv_head * group + unit % group;
      if (part) column -= a.key[0].dim;
      from[i] = unit < units ? address_of(a.query[part], row, head * a.query_stride[part] + column) : nullptr;
    }
    load_eights(x, a.query[0].type, from);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      int unit = (first + i * WORKERS) / PIECES, piece = (first + i * WORKERS) % PIECES;
      uint32_t panel = to + unit / 64 * Shape<KEY, VALUE>::KEY_BYTES + piece / 8 * PANEL_BYTES;
      store_shared(swizzled(panel, unit % 64, piece % 8), x[i]);
    }
  }
}

template <int KEY>
__device__ inline void multiply_tile(float (&score)[TILE / 8][4], const uint32_t (&query)[KEY / 16][4], uint32_t keys) {
  uint64_t k = descriptor(keys);
  multiply_keys<true>(score, query[0], k);
#pragma unroll
  for (int step = 1; step < KEY / 16; ++step)
    multiply_keys<false>(score, query[step], k + step / 4 * (PANEL_BYTES >> 4) + step % 4 * 2);
}

template <int KEY, int VALUE> __global__ void __launch_bounds__(THREADS, 1) attention(MoeyardAttention a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<KEY, VALUE>;
  extern __shared__ unsigned char shared[];
  // Blocks that run together share a KV head, and the second-level cache holds it. The last rows see most and start first.
  int kv_head = int(blockIdx.x) / a.span_count, index = a.span_count - 1 - int(blockIdx.x) % a.span_count;
  const MoeyardSpan span = a.spans[index];
  int group = a.heads / a.kv_heads, units = int(span.rows) * group;
  int first = a.window ? max(0, int(span.position) - a.window + 1) : 0, end = int(span.position + span.rows);
  first = first / TILE * TILE;
  int tiles = (end - first + TILE - 1) / TILE;
  Layout<KEY, VALUE> at(shared_address(shared));
  if (threadIdx.x == 0) at.init();
  __syncthreads();
  if (threadIdx.x < COPIERS) {
    fewer_registers<COPIER_REGISTERS>();
    Copies<KEY, VALUE> copies(a, span, kv_head, end);
    copy_tiles(copies, at, first, tiles);
    return;
  }
  more_registers<WORKER_REGISTERS>();
  fetch_queries<KEY, VALUE>(a, span, kv_head, at.queries);
  named_wait<WORKERS>(ALL_WORKERS);

  // Of this lane's two pairs, and of its warpgroup.
  int warp = uniform((int(threadIdx.x) - COPIERS) / WARP), warpgroup = warp / 4, lane = threadIdx.x % WARP;
  int pair[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  Sight sight;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sight.last[r] = pair[r] < units ? int(span.position) + pair[r] / group : -1;
    sight.oldest[r] = a.window ? sight.last[r] - a.window + 1 : 0;
  }
  int own_units = min(units, (warpgroup + 1) * 64);
  bool working = warpgroup * 64 < units;
  int own_end = working ? int(span.position) + (own_units - 1) / group + 1 : first;
  int own_tiles = (own_end - first + TILE - 1) / TILE;
  int lowest = int(span.position) + warpgroup * 64 / group;  // of the rows' positions
  uint32_t query[KEY / 16][4];
#pragma unroll
  for (int i = 0; i < KEY / 16; ++i) {
    uint32_t panel = at.queries + warpgroup * S::KEY_BYTES + i / 4 * PANEL_BYTES;
    load_matrix_x4(query[i], swizzled(panel, warp % 4 * 16 + lane % 16, i % 4 * 2 + lane / 16));
  }
  // By the time that the first chunk ends every worker has its queries: it has given its turn.
  float* sums = reinterpret_cast<float*>(shared + (at.queries - shared_address(shared))) + (threadIdx.x - COPIERS);
  bool merged = false;
  float scale = a.scale * LOG2E;
  State total[2] = {nothing(), nothing()}, state[2] = {nothing(), nothing()};
  float out[VALUE / 8][4] = {};

  // A tile's scores become weights; what was summed of earlier tiles is to be multiplied by `keep`.
  float score[TILE / 8][4], keep[2];
  auto soften = [&](int start) __attribute__((always_inline)) {
    if (start + TILE - 1 > lowest || (a.window && start <= own_end - 1 - a.window)) hide(score, start, sight);
    weigh_tile(score, scale, state, keep);
  };
  uint32_t weights[TILE / 16][4];
  auto pack_weights = [&]() __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i < TILE / 16; ++i) operand(weights[i], score, i);
  };

  // A tile has been read by this warp.
  auto release = [&](uint32_t empty) __attribute__((always_inline)) {
    if (lane == 0) phase_arrive(empty);
  };

  phase_wait(at.keys_full(0), at.parity(0));
  if (working) {
    wgmma_begin();
    multiply_tile<KEY>(score, query, at.keys(0));
    wgmma_commit();
    wgmma_wait<0>();
    settle(score);
    soften(first);
    pack_weights();
  }
  release(at.keys_empty(0));
  if (warpgroup == 1) named_arrive<WORKERS>(TURN);
  for (int t = 0; t < tiles; ++t) {
    bool more = t + 1 < own_tiles;
    if (t + 1 < tiles) phase_wait(at.keys_full(t + 1), at.parity(t + 1));
    phase_wait(at.values_full(t), at.parity(t));
    named_wait<WORKERS>(TURN + warpgroup);
    auto multiply_all_values = [&]() __attribute__((always_inline)) {
      uint64_t v = value_descriptor(at.values(t));
#pragma unroll
      for (int i = 0; i < TILE / 16; ++i) multiply_values(out, weights[i], v + i * (16 * 128 >> 4));
      wgmma_commit();
    };
    auto end_turn = [&]() __attribute__((always_inline)) {
      if (warpgroup == 0 || t + 1 < tiles) named_arrive<WORKERS>(TURN + (warpgroup ^ 1));
    };
    settle(out);
    if (!more) {  // the last tile that this warpgroup sees, or one that only the other one does
      if (t + 1 == own_tiles) {
        wgmma_begin();
        multiply_all_values();
      }
      end_turn();
      wgmma_wait<0>();
      settle(out);
      if (t + 1 < tiles) release(at.keys_empty(t + 1));
      release(at.values_empty(t));
      continue;
    }
    int start = first + t * TILE;
    wgmma_begin();
    multiply_tile<KEY>(score, query, at.keys(t + 1));
    wgmma_commit();
    multiply_all_values();
    end_turn();
    wgmma_wait<1>();
    settle(score);
    release(at.keys_empty(t + 1));
    bool chunk_ends = (start + TILE) % CHUNK == 0;
    State before[2] = {state[0], state[1]};
    if (chunk_ends) state[0] = state[1] = nothing();
    soften(start + TILE);
    wgmma_wait<0>();
    settle(out);
    release(at.values_empty(t));
    if (chunk_ends) {  // it joins those before
      Factors f[2] = {join(total[0], before[0]), join(total[1], before[1])};
#pragma unroll
      for (int d = 0; d < VALUE / 8; ++d)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& sum = sums[(d * 4 + e) * WORKERS];
          sum = joined(merged ? sum : 0.0f, out[d][e], f[e / 2]);
          out[d][e] = 0.0f;
        }
      merged = true;
    } else {
      rescale(out, keep);
    }
    pack_weights();
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
    for (int d = 0; d < VALUE / 8; ++d) {
      float value[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float early = merged ? sums[(d * 4 + r * 2 + e) * WORKERS] : 0.0f;
        value[e] = joined(early, out[d][r * 2 + e], f[r]) * last;
      }
      store_pair(a.out, row, int64_t(head) * VALUE + d * 8 + lane % 4 * 2, value[0], value[1]);
    }
  }
#endif
}

template <int KEY, int VALUE> int launch(const MoeyardAttention& a, void* stream) {
  constexpr int BYTES = Shape<KEY, VALUE>::SHARED_BYTES;
  if (cudaError_t error = allow(attention<KEY, VALUE>, BYTES)) return int(error);
  attention<KEY, VALUE><<<a.span_count * a.kv_heads, THREADS, BYTES, stream_of(stream)>>>(a);
  return launched();
}

}  // namespace

extern "C" int moeyard_attention_sm90(const MoeyardAttention* a, void* stream) {
  if (a->span_count == 0) return 0;
  int key = a->key[0].dim + a->key[1].dim, value = a->value.dim;
  if (key == 64 && value == 64) return launch<64, 64>(*a, stream);
  if (key == 128 && value == 128) return launch<128, 128>(*a, stream);
  if (key == 192 && value == 128) return launch<192, 128>(*a, stream);
  return int(cudaErrorInvalidValue);
}
