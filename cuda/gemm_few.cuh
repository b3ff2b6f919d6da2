// Products of few rows with few outputs, where no block has enough work to hide what its threads wait for: each warp goes its own way. A
// warp computes 16 outputs of up to 16 rows. It copies its own weights and rows, so nothing but its own copies holds it up, and the fragments
// of a stage are on their way into registers while the stage before is multiplied. The bits are those of all bf16 products (k in steps of 16).
#pragma once
#include "shape.cuh"

namespace moeyard {

// ROWS: 8 or 16.
template <int ROWS, int STAGES_> struct Few : Shape<1, 1, 1, ROWS / 8, STAGES_> {
  static constexpr int WEIGHT_BYTES = 16 * DEPTH * 2, STAGE_BYTES = WEIGHT_BYTES + ROWS * DEPTH * 2;
};

// A lane's share of the copies of ROWS rows into a stage: one chunk of every fourth row. Where it goes to is known when the stage is.
template <int ROWS> struct LaneSource {
  static constexpr int APART = 4, COUNT = ROWS / APART;
  const bf16* from[COUNT];
  int valid;       // copies whose rows exist
  uint32_t to[2];  // of even and odd copies

  __device__ LaneSource(const bf16* first, int64_t stride, int rows, uint32_t base) {
    int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) from[i] = first + (row + i * APART) * stride + chunk * 8;
    valid = row < rows ? (min(rows, ROWS) - row + APART - 1) / APART : 0;
    to[0] = base + swizzled(0, row, chunk);
    to[1] = base + swizzled(0, row + APART, chunk) - APART * 128;
  }

  // Copy i of the stage that is `stages` beyond the first; `offset` is where it lies in shared memory.
  __device__ void copy(int i, int stages, int offset) const {
    copy_async(to[i % 2] + offset + i * APART * 128, from[i] + stages * DEPTH, true);
  }
  __device__ void advance(int stages) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) from[i] += stages * DEPTH;
  }

  // The first STAGES stages, as far as there are `steps`, through registers: no copy of weights is waited for with these. Zeros in rows that
  // do not exist, in one stage more: nothing is copied there later.
  template <int STAGES> __device__ void store(int steps, int stage_bytes) const {
    uint4 held[STAGES][COUNT];
#pragma unroll
    for (int s = 0; s < STAGES; ++s)
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        held[s][i] = i < valid && s < steps ? *reinterpret_cast<const uint4*>(from[i] + s * DEPTH) : uint4{};
#pragma unroll
    for (int s = 0; s < STAGES; ++s)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) store_shared(to[i % 2] + s * stage_bytes + i * APART * 128, held[s][i]);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (i >= valid) store_shared(to[i % 2] + STAGES * stage_bytes + i * APART * 128, uint4{});
  }
};

// Fragments of a stage, and where a lane finds them in the first stage.
template <class S> struct FewFragments {
  uint32_t a[DEPTH / 16][4], b[DEPTH / 16][S::TILES_R][2];
};
template <class S> struct FewPlaces {
  static constexpr int STEPS = DEPTH / 16;
  uint32_t a[STEPS], b[STEPS];

  __device__ FewPlaces(uint32_t base) {
    int lane = threadIdx.x;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      a[step] = swizzled(base, lane % 16, step * 2 + lane / 16);
      // Rows 0 to 7 of this step and the next, or rows 0 to 15 of this one.
      int row = S::TILES_R == 1 ? lane % 8 : lane / 16 * 8 + lane % 8, chunk = S::TILES_R == 1 ? lane / 8 : lane / 8 % 2;
      b[step] = swizzled(base + S::WEIGHT_BYTES, row, step * 2 + chunk);
    }
  }

  __device__ void load(FewFragments<S>& f, int offset) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) load_matrix_x4(f.a[step], a[step] + offset);
#pragma unroll
    for (int step = 0; step < STEPS; step += 3 - S::TILES_R) {
      uint32_t r[4];
      load_matrix_x4(r, b[step] + offset);
      if constexpr (S::TILES_R == 1) {
        f.b[step][0][0] = r[0], f.b[step][0][1] = r[1], f.b[step + 1][0][0] = r[2], f.b[step + 1][0][1] = r[3];
      } else {
        f.b[step][0][0] = r[0], f.b[step][0][1] = r[1], f.b[step][1][0] = r[2], f.b[step][1][1] = r[3];
      }
    }
  }
};

// k is a multiple of DEPTH, n of 16.
template <class S> __global__ void __launch_bounds__(WARP) gemm_few(MoeyardGemm a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int STAGES = S::STAGES, STEPS = DEPTH / 16;
  static_assert(STAGES % 2 == 0, "stages and fragments turn together");
  Tile tile = find_tile(a, blockIdx.x, S::R, start_in_turn);
  if (tile.rows == 0) return;
  int col = blockIdx.y * S::N, steps = a.k / DEPTH;
  const bf16* x = static_cast<const bf16*>(a.x.data) + blockIdx.z * a.x_batch + int64_t(tile.row) * a.x.stride;
  const bf16* w = static_cast<const bf16*>(tile.weight) + blockIdx.z * a.w_batch + int64_t(col) * a.ldw;
  uint32_t base = shared_address(shared);
  LaneSource<S::N> weights(w, a.ldw, S::N, base);
  LaneSource<S::R> rows(x, a.x.stride, tile.rows, base + S::WEIGHT_BYTES);
  FewPlaces<S> places(base);
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < steps)
#pragma unroll
      for (int i = 0; i < weights.COUNT; ++i) weights.copy(i, s, s * S::STAGE_BYTES);
    copy_commit();
  }
  rows.template store<STAGES - 1>(steps, S::STAGE_BYTES);

  float acc[1][S::TILES_R][4] = {};
  FewFragments<S> fragments[2];
  copy_wait<STAGES - 2>();
  __syncwarp();
  places.load(fragments[0], 0);
  // A turn of the ring, so that all places are known to the compiler: a warp alone on its scheduler waits for every instruction.
  for (int first = 0; first < steps; first += STAGES) {
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
      if (first + s == steps) break;
      copy_wait<STAGES - 3>();
      __syncwarp();
      places.load(fragments[(s + 1) % 2], (s + 1) % STAGES * S::STAGE_BYTES);
      // Into the stage that was multiplied last. Copies stand between products, which wait for each other.
      constexpr int AHEAD = STAGES - 1;
      bool more = first + s + AHEAD < steps;
      int offset = (s + AHEAD) % STAGES * S::STAGE_BYTES;
      const FewFragments<S>& now = fragments[s % 2];
#pragma unroll
      for (int k = 0; k < STEPS; ++k) {
#pragma unroll
        for (int j = 0; j < S::TILES_R; ++j) multiply_add(acc[0][j], now.a[k], now.b[k][j][0], now.b[k][j][1]);
        if (more) weights.copy(k, s + AHEAD, offset);
        if (more && k < rows.COUNT && k < rows.valid) rows.copy(k, s + AHEAD, offset);
      }
      copy_commit();
    }
    weights.advance(STAGES);
    rows.advance(STAGES);
  }
  finish_all<S>(a, tile, col, acc);
}

// Whole stages and whole tiles, and so few warps that a multiprocessor has room for all of its share.
template <class S> bool few_serves(const MoeyardGemm& a) {
  static_assert(AT_ONCE_EACH * (S::STAGE_BYTES * S::STAGES + 2048) <= 227 * 1024, "warps of a multiprocessor");
  return a.k % DEPTH == 0 && a.n % S::N == 0 && blocks_of<S>(a) <= at_once();
}

template <class S> int launch_few(const MoeyardGemm& a, void* stream) {
  return launch_product<S>(gemm_few<S>, a, S::STAGE_BYTES * S::STAGES, stream);
}

}  // namespace moeyard
