// What a block of threads computes with `multiply_add`, whatever its weights are stored as: the weights are the first operand (16 outputs
// by 16 k), the rows the second (8 rows), so decode wastes little.
#pragma once
#include "finish.cuh"
#include "source.cuh"

namespace moeyard {

// A block computes WARPS_N * TILES_N * 16 outputs of WARPS_R * TILES_R * 8 rows.
template <int WARPS_N_, int WARPS_R_, int TILES_N_, int TILES_R_, int STAGES_> struct Shape {
  static constexpr int WARPS_N = WARPS_N_, WARPS_R = WARPS_R_, TILES_N = TILES_N_, TILES_R = TILES_R_, STAGES = STAGES_;
  static constexpr int THREADS = WARPS_N * WARPS_R * WARP;
  static constexpr int N = WARPS_N * TILES_N * 16, R = WARPS_R * TILES_R * 8;
};

// This warp's first output and row in its block.
template <class S> __device__ inline int first_output() {
  int warp = threadIdx.x / WARP;
  return warp % S::WARPS_N * S::TILES_N * 16;
}
template <class S> __device__ inline int first_row() {
  int warp = threadIdx.x / WARP;
  return warp / S::WARPS_N * S::TILES_R * 8;
}

// This warp's rows at one step of 16 k, from a stage of rows.
template <class S> __device__ inline void load_rows(uint32_t (&b)[S::TILES_R][2], uint32_t x, int step) {
  int lane = threadIdx.x % WARP, r0 = first_row<S>();
  if constexpr (S::TILES_R % 2 == 0) {
#pragma unroll
    for (int j = 0; j < S::TILES_R; j += 2) {
      uint32_t r[4];
      load_matrix_x4(r, swizzled(x, r0 + j * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
  } else {
#pragma unroll
    for (int j = 0; j < S::TILES_R; ++j)
      load_matrix_x2(b[j], swizzled(x, r0 + j * 8 + lane % 8, step * 2 + lane / 8 % 2));
  }
}

// Stores what the block computed: `tile` of rows, outputs from `col`.
template <class S>
__device__ inline void finish_all(const MoeyardGemm& a, const Tile& tile, int col, const float (&acc)[S::TILES_N][S::TILES_R][4]) {
  int lane = threadIdx.x % WARP, n0 = col + first_output<S>(), r0 = first_row<S>();
#pragma unroll
  for (int i = 0; i < S::TILES_N; ++i) {
    Outputs outputs = outputs_of(a, tile, n0 + i * 16, lane);
#pragma unroll
    for (int j = 0; j < S::TILES_R; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        finish(a, tile, outputs, blockIdx.z * a.out_batch, r0 + j * 8 + lane % 4 * 2 + e, acc[i][j][e], acc[i][j][e + 2]);
  }
}

template <class S> int64_t blocks_of(const MoeyardGemm& a) { return int64_t(a.row_tiles) * ((a.n + S::N - 1) / S::N) * a.batches; }

// Blocks that a multiprocessor has at once, and all of them.
constexpr int AT_ONCE_EACH = 4;
inline int at_once() { return AT_ONCE_EACH * MULTIPROCESSORS; }

// A large grid starts early. The blocks of a small one would all find places before the kernel before has ended, crowded on the
// multiprocessors that it left first (H200: experts of one token in fp8 149 us in place of 115).
template <class S> int launch_product(void (*kernel)(MoeyardGemm), const MoeyardGemm& a, int shared, void* stream) {
  dim3 grid(a.row_tiles, (a.n + S::N - 1) / S::N, a.batches);
  if (cudaError_t error = allow(kernel, shared)) return int(error);
  if (blocks_of<S>(a) > at_once()) return launch_early(kernel, grid, S::THREADS, shared, stream, a);
  kernel<<<grid, S::THREADS, shared, stream_of(stream)>>>(a);
  return launched();
}

// With few tiles, narrower ones keep more multiprocessors busy.
template <class Wide> bool fills_the_gpu(const MoeyardGemm& a) { return blocks_of<Wide>(a) >= 2 * MULTIPROCESSORS; }

}  // namespace moeyard
