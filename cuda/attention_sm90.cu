// Attention of several rows of a sequence on Hopper, with the warpgroup instructions of sm_90a: grouped queries over the paged cache
// with heads of 64 or 128, windows, sinks; and the expanded form of MLA, whose keys are 128 columns of rows in order of position
// and 64 of the paged cache. A row has the bits that attention_bf16.cu and attention_decode.cu give it.
//
// A block works on 128 (row, query head) pairs that share a KV head, 64 for each of two warpgroups, and walks all positions they see.
// The warpgroups take turns to issue products: while one's scores become weights, the tensor cores work for the other (the schedule
// of FlashAttention-3, Shah et al. 2024). A turn also tells the other warpgroup that copies have landed and which tiles are read.
#include "attention_wgmma.cuh"
#include "softmax.cuh"

using namespace moeyard;

namespace {

constexpr int GROUPS = 2, UNITS = GROUPS * 64, THREADS = GROUPS * 128;
// Tiles of keys, and of values, in shared memory. In iteration t a warpgroup reads keys t + 1 and values t and copies keys t + 3 and
// values t + 2, while the other may still be in iteration t - 1.
constexpr int STAGES = 4;

// Widths of keys and values.
template <int KEY, int VALUE> struct Shape {
  static constexpr bool EXPANDED = KEY != VALUE;
  static constexpr int KEY_BYTES = KEY / 64 * PANEL_BYTES, VALUE_BYTES = VALUE / 64 * PANEL_BYTES;
  static constexpr int QUERY_BYTES = GROUPS * KEY_BYTES;
  static constexpr int SHARED_BYTES = QUERY_BYTES + STAGES * (KEY_BYTES + VALUE_BYTES) + 1024;
};

// A thread's share of the copies of a tile: the same piece of 16 bytes of two rows in every panel.
template <int KEY, int VALUE> struct Copies {
  using S = Shape<KEY, VALUE>;
  const MoeyardAttention& a;
  const MoeyardSpan& span;
  const bf16 *keys, *rope, *values;
  int end, piece, row;
  int next[2], paged[2];  // cache rows of the tile of keys copied next, and of the one copied last

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
      copy_async(swizzled(to + p * PANEL_BYTES, row + i * 32, piece), source + p * 64, valid);
  }

  // Some time before `issue_keys`, so that the block table does not hold up the copies.
  __device__ void look_up(int start) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int position = start + row + i * 32;
      next[i] = position < end ? cache_row(a, span, position) : 0;
    }
  }

  __device__ void issue_keys(int start, uint32_t to) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int position = start + row + i * 32;
      bool valid = position < end;
      paged[i] = next[i];
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
    for (int i = 0; i < 2; ++i) {
      int position = start + row + i * 32;
      bool valid = position < end;
      copy<VALUE / 64>(values, a.value.stride, i, S::EXPANDED ? (valid ? position : 0) : paged[i], valid, to);
    }
  }
};

// The queries' columns come in two parts where the keys do.
template <int KEY, int VALUE>
__device__ void fetch_queries(const MoeyardAttention& a, const MoeyardSpan& span, int kv_head, uint32_t to) {
  constexpr int PIECES = KEY / 8;
  int group = a.heads / a.kv_heads, units = int(span.rows) * group;
  for (int i = threadIdx.x; i < UNITS * PIECES; i += THREADS) {
    int unit = i / PIECES, piece = i % PIECES, column = piece * 8, part = column >= a.key[0].dim;
    uint4 x = {};
    if (unit < units) {
      int64_t head = kv_head * group + unit % group;
      if (part) column -= a.key[0].dim;
      x = load_eight(a.query[part], int64_t(span.row) + unit / group, head * a.query_stride[part] + column);
    }
    uint32_t panel = to + unit / 64 * Shape<KEY, VALUE>::KEY_BYTES + piece / 8 * PANEL_BYTES;
    store_shared(swizzled(panel, unit % 64, piece % 8), x);
  }
}

// Named barriers: a warpgroup waits for its turn, and gives it to the other one.
__device__ inline void take_turn(int warpgroup) { asm volatile("bar.sync %0, %1;\n" ::"r"(1 + warpgroup), "n"(THREADS) : "memory"); }
__device__ inline void give_turn(int warpgroup) { asm volatile("bar.arrive %0, %1;\n" ::"r"(1 + warpgroup), "n"(THREADS) : "memory"); }

template <int KEY> __device__ inline void multiply_tile(float (&score)[TILE / 8][4], uint32_t queries, uint32_t keys) {
  uint64_t q = descriptor(queries), k = descriptor(keys);
  multiply_keys<true>(score, q, k);
#pragma unroll
  for (int step = 1; step < KEY / 16; ++step) {
    int at = step / 4 * (PANEL_BYTES >> 4) + step % 4 * 2;
    multiply_keys<false>(score, q + at, k + at);
  }
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
  uint32_t base = (shared_address(shared) + 1023) / 1024 * 1024;
  uint32_t keys = base + S::QUERY_BYTES, values = keys + STAGES * S::KEY_BYTES;

  Copies<KEY, VALUE> copies(a, span, kv_head, end);
  int tiles = (end - first + TILE - 1) / TILE;
  // Keys of tile t and values of the tile before it.
  auto fetch = [&](int t) __attribute__((always_inline)) {
    if (t > 0 && t <= tiles) copies.issue_values(first + (t - 1) * TILE, values + (t - 1) % STAGES * S::VALUE_BYTES);
    if (t < tiles) copies.issue_keys(first + t * TILE, keys + t % STAGES * S::KEY_BYTES);
    copy_commit();
    copies.look_up(first + (t + 1) * TILE);
  };
  copies.look_up(first);
  fetch(0);
  fetch(1);
  fetch(2);
  fetch_queries<KEY, VALUE>(a, span, kv_head, base);

  // Of this lane's two pairs, and of its warpgroup.
  int warpgroup = threadIdx.x / 128, lane = threadIdx.x % WARP;
  int pair[2] = {int(threadIdx.x) / WARP * 16 + lane / 4, int(threadIdx.x) / WARP * 16 + lane / 4 + 8};
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
  uint32_t queries = base + warpgroup * S::KEY_BYTES;
  float scale = a.scale * LOG2E;
  State total[2] = {nothing(), nothing()}, state[2] = {nothing(), nothing()};
  float out[VALUE / 8][4] = {}, sums[VALUE / 8][4] = {};  // of the chunk, and of those before it

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

  copy_wait<1>();
  fence_for_wgmma();
  __syncthreads();  // keys 0 and 1, values 0
  if (working) {
    wgmma_begin();
    multiply_tile<KEY>(score, queries, keys);
    wgmma_commit();
    wgmma_wait<0>();
    settle(score);
    soften(first);
    pack_weights();
  }
  if (warpgroup == 1) give_turn(0);
  for (int t = 0; t < tiles; ++t) {
    take_turn(warpgroup);
    // Behind the products of this turn.
    auto end_turn = [&]() __attribute__((always_inline)) {
      copy_wait<0>();
      fence_for_wgmma();
      if (warpgroup == 0 || t + 1 < tiles) give_turn(warpgroup ^ 1);
      fetch(t + 3);
    };
    if (t >= own_tiles) {
      end_turn();
      continue;
    }
    int start = first + t * TILE;
    uint64_t v = value_descriptor(values + t % STAGES * S::VALUE_BYTES);
    auto multiply_all_values = [&]() __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < TILE / 16; ++i) multiply_values(out, weights[i], v + i * (16 * 128 >> 4));
      wgmma_commit();
    };
    settle(out);
    if (t + 1 == own_tiles) {
      wgmma_begin();
      multiply_all_values();
      end_turn();
      wgmma_wait<0>();
      settle(out);
      continue;
    }
    wgmma_begin();
    multiply_tile<KEY>(score, queries, keys + (t + 1) % STAGES * S::KEY_BYTES);
    wgmma_commit();
    multiply_all_values();
    end_turn();
    wgmma_wait<1>();
    settle(score);
    bool chunk_ends = (start + TILE) % CHUNK == 0;
    State before[2] = {state[0], state[1]};
    if (chunk_ends) state[0] = state[1] = nothing();
    soften(start + TILE);
    wgmma_wait<0>();
    settle(out);
    if (chunk_ends) {  // it joins those before
      Factors f[2] = {join(total[0], before[0]), join(total[1], before[1])};
#pragma unroll
      for (int d = 0; d < VALUE / 8; ++d)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[d][e] = joined(sums[d][e], out[d][e], f[e / 2]);
          out[d][e] = 0.0f;
        }
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
      for (int e = 0; e < 2; ++e) value[e] = joined(sums[d][r * 2 + e], out[d][r * 2 + e], f[r]) * last;
      store_pair(a.out, row, int64_t(head) * VALUE + d * 8 + lane % 4 * 2, value[0], value[1]);
    }
  }
#endif
}

template <int KEY, int VALUE> int launch(const MoeyardAttention& a, void* stream) {
  constexpr int BYTES = Shape<KEY, VALUE>::SHARED_BYTES;
  cudaError_t error = cudaFuncSetAttribute(attention<KEY, VALUE>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (error) return int(error);
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
