// Products with few outputs in plain f32: routers and gates. The lanes of a warp share k out: lane l adds up k = 4 l .. 4 l + 3 of every 128
// in ascending order, and the lanes' sums are added as a tree. So an element has the same bits whatever the tile.
#include "common.cuh"

using namespace moeyard;

namespace {

constexpr int WIDTH = 4 * WARP;  // k of a warp's step

// A warp computes COLS outputs of ROWS rows; a block has DOWN warps below each other and ACROSS side by side.
template <int ROWS_, int COLS_, int DOWN_, int ACROSS_> struct Shape {
  static constexpr int ROWS = ROWS_, COLS = COLS_, DOWN = DOWN_, ACROSS = ACROSS_, THREADS = DOWN * ACROSS * WARP;
  // Steps whose loads are under way at once: what the registers hold.
  static constexpr int LOADS = THREADS <= 128 ? 32 : 16, AHEAD = ROWS + COLS < LOADS ? LOADS / (ROWS + COLS) : 1;
};

template <bool ALIGNED> __device__ inline float4 four(const float* x, int k, int end) {
  if (ALIGNED) return k < end ? *reinterpret_cast<const float4*>(x + k) : float4{};
  return {k < end ? x[k] : 0.0f, k + 1 < end ? x[k + 1] : 0.0f, k + 2 < end ? x[k + 2] : 0.0f, k + 3 < end ? x[k + 3] : 0.0f};
}

__device__ inline float chain(float sum, float4 x, float4 w) {
  return fmaf(x.w, w.w, fmaf(x.z, w.z, fmaf(x.y, w.y, fmaf(x.x, w.x, sum))));
}

template <class S, bool ALIGNED> __global__ void __launch_bounds__(S::THREADS) narrow(MoeyardGemm a) {
  constexpr int ROWS = S::ROWS, COLS = S::COLS, AHEAD = S::AHEAD;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int row = (blockIdx.x * S::DOWN + warp / S::ACROSS) * ROWS, col = (blockIdx.y * S::ACROSS + warp % S::ACROSS) * COLS;
  if (row >= a.x.rows || col >= a.n) return;
  // Weights never change while a step runs, so they are on their way before the rows are.
  for (int k = lane * 32; k < a.k; k += 32 * WARP) {
    const float* ahead = static_cast<const float*>(a.weight) + int64_t(col) * a.ldw + k;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(ahead));
  }
  start_in_turn();
  const float *x[ROWS], *w[COLS];
  // What lies outside is computed from the last row and output, and dropped.
  for (int i = 0; i < ROWS; ++i) x[i] = static_cast<const float*>(a.x.data) + min(row + i, a.x.rows - 1) * a.x.stride;
  for (int j = 0; j < COLS; ++j) w[j] = static_cast<const float*>(a.weight) + int64_t(min(col + j, a.n - 1)) * a.ldw;
  float acc[ROWS][COLS] = {};
  for (int first = lane * 4; first < a.k; first += AHEAD * WIDTH) {
    float4 u[AHEAD][ROWS], v[AHEAD][COLS];
#pragma unroll
    for (int s = 0; s < AHEAD; ++s) {
      int k = first + s * WIDTH;
#pragma unroll
      for (int i = 0; i < ROWS; ++i) u[s][i] = four<ALIGNED>(x[i], k, a.k);
#pragma unroll
      for (int j = 0; j < COLS; ++j) v[s][j] = four<ALIGNED>(w[j], k, a.k);
    }
#pragma unroll
    for (int s = 0; s < AHEAD; ++s) {
      if (first + s * WIDTH >= a.k) break;
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLS; ++j) acc[i][j] = chain(acc[i][j], u[s][i], v[s][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < COLS; ++j) {
      float sum = warp_sum(acc[i][j]);
      if (lane != 0 || row + i >= a.x.rows || col + j >= a.n) continue;
      store(a.out, row + i, col + j, a.bias ? sum + a.bias[col + j] : sum);
    }
}

template <class S> int launch(const MoeyardGemm& a, void* stream) {
  constexpr int ROWS = S::DOWN * S::ROWS, COLS = S::ACROSS * S::COLS;
  dim3 grid((a.x.rows + ROWS - 1) / ROWS, (a.n + COLS - 1) / COLS);
  bool aligned = reinterpret_cast<uintptr_t>(a.x.data) % 16 == 0 && a.x.stride % 4 == 0 && a.ldw % 4 == 0 && a.k % 4 == 0;
  return launch_early(aligned ? narrow<S, true> : narrow<S, false>, grid, S::THREADS, 0, stream, a);
}

}  // namespace

extern "C" int moeyard_gemm_narrow(const MoeyardGemm* a, void* stream) {
  if (a->x.rows == 0 || a->n == 0) return 0;
  // Larger tiles read less, smaller ones keep more warps busy.
  int64_t outputs = int64_t(a->x.rows) * a->n;
  if (outputs <= 4096) return launch<Shape<1, 1, 1, 4>>(*a, stream);
  if (outputs <= 32768) return launch<Shape<2, 2, 1, 4>>(*a, stream);
  if (outputs <= 262144 || a->n < 16) return launch<Shape<4, 4, 1, 4>>(*a, stream);
  return launch<Shape<8, 4, 4, 4>>(*a, stream);
}
