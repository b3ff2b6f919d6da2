// Products in plain f32 arithmetic (no tf32), for any mixture of f32 and bf16 operands, any width and any alignment. Each
// output element is one chain of fused multiply-adds over ascending k.
#include "groups.cuh"

using namespace moeyard;

namespace {

constexpr int ROWS = 64, COLS = 64, DEPTH = 16, THREADS = 256, EACH = 4;

template <class X, class W> __global__ void __launch_bounds__(THREADS) gemm(MoeyardGemm a) {
  __shared__ float xs[DEPTH][ROWS + 4], ws[DEPTH][COLS + 4];
  Tile tile = find_tile(a, blockIdx.x, ROWS, start_in_turn);
  if (tile.rows == 0) return;
  int col = blockIdx.y * COLS;
  const X* x = static_cast<const X*>(a.x.data) + blockIdx.z * a.x_batch + int64_t(tile.row) * a.x.stride;
  const W* w = static_cast<const W*>(tile.weight) + blockIdx.z * a.w_batch + int64_t(col) * a.ldw;
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float acc[EACH][EACH] = {};
  for (int k0 = 0; k0 < a.k; k0 += DEPTH) {
    for (int i = threadIdx.x; i < ROWS * DEPTH; i += THREADS) {
      int r = i / DEPTH, k = i % DEPTH;
      bool in_k = k0 + k < a.k;
      xs[k][r] = in_k && r < tile.rows ? widen(x[int64_t(r) * a.x.stride + k0 + k]) : 0.0f;
      ws[k][r] = in_k && col + r < a.n ? widen(w[int64_t(r) * a.ldw + k0 + k]) : 0.0f;
    }
    __syncthreads();
    int depth = min(DEPTH, a.k - k0);
    for (int k = 0; k < depth; ++k) {
      float u[EACH], v[EACH];
      for (int i = 0; i < EACH; ++i) u[i] = xs[k][ty * EACH + i];
      for (int j = 0; j < EACH; ++j) v[j] = ws[k][tx + 16 * j];
      for (int i = 0; i < EACH; ++i)
        for (int j = 0; j < EACH; ++j) acc[i][j] = fmaf(u[i], v[j], acc[i][j]);
    }
    __syncthreads();
  }
  const float* bias = bias_of(a, tile);
  MoeyardMatrix out = a.out;
  int64_t shift = blockIdx.z * a.out_batch;
  for (int i = 0; i < EACH; ++i) {
    int r = ty * EACH + i;
    if (r >= tile.rows) continue;
    for (int j = 0; j < EACH; ++j) {
      int c = col + tx + 16 * j;
      if (c < a.n) store(out, tile.row + r, shift + c, bias ? acc[i][j] + bias[c] : acc[i][j]);
    }
  }
}

}  // namespace

extern "C" int moeyard_gemm_f32(const MoeyardGemm* a, void* stream) {
  if (a->row_tiles == 0 || a->n == 0 || a->batches == 0) return 0;
  dim3 grid(a->row_tiles, (a->n + COLS - 1) / COLS, a->batches);
  auto s = stream_of(stream);
  bool xb = a->x.type == MOEYARD_BF16, wb = a->w_type == MOEYARD_BF16;
  if (xb && wb) gemm<bf16, bf16><<<grid, THREADS, 0, s>>>(*a);
  else if (wb) gemm<float, bf16><<<grid, THREADS, 0, s>>>(*a);
  else if (xb) gemm<bf16, float><<<grid, THREADS, 0, s>>>(*a);
  else gemm<float, float><<<grid, THREADS, 0, s>>>(*a);
  return launched();
}
