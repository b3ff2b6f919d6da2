// The prefill tile of products on Hopper: the layout, the order of k and the lanes' outputs of gemm_bf16.cu with the warpgroup
// instructions of sm_90a. tests/gpu compares the bits of both.
#include "finish.cuh"
#include "groups.cuh"
#include "wgmma.cuh"

using namespace moeyard;

namespace {

constexpr int DEPTH = 64;  // k per stage: a row of 128 bytes
constexpr int GROUPS = 2;  // warpgroups
constexpr int HALVES = 2;  // tiles of 64 outputs of each
constexpr int N = GROUPS * HALVES * 64, THREADS = GROUPS * 128;

// ROWS rows of x by 256 outputs.
template <int ROWS> struct Shape {
  static constexpr int STAGES = 4;
  static constexpr int STAGE_BYTES = (N + ROWS) * DEPTH * 2;
  static constexpr int SHARED_BYTES = STAGE_BYTES * STAGES + 1024;
};

template <int COUNT>
__device__ void fetch(uint32_t to, const bf16* from, int64_t stride, int rows, int k_left) {
  // A thread always copies the same chunk of a row; rows are THREADS / 8 apart.
  int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
  bool in_k = chunk * 8 < k_left;
  const bf16* source = from + row * stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < COUNT * 8 / THREADS; ++i) {
    bool valid = in_k && row < rows;
    copy_async(swizzled(to, row, chunk), valid ? source : from, valid);
    row += THREADS / 8;
    source += THREADS / 8 * stride;
  }
}

template <int ROWS> __global__ void __launch_bounds__(THREADS, 1) gemm(MoeyardGemm a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<ROWS>;
  extern __shared__ unsigned char shared[];
  Tile tile = find_tile(a, blockIdx.x, ROWS);
  if (tile.rows == 0) return;
  int col = blockIdx.y * N, group = threadIdx.x / 128;
  const bf16* x = static_cast<const bf16*>(a.x.data) + blockIdx.z * a.x_batch + int64_t(tile.row) * a.x.stride;
  const bf16* w = static_cast<const bf16*>(weight_of(a, tile)) + blockIdx.z * a.w_batch + int64_t(col) * a.ldw;
  uint32_t base = (shared_address(shared) + 1023) / 1024 * 1024;
  int steps = (a.k + DEPTH - 1) / DEPTH;
  auto issue = [&](int step) {
    if (step < steps) {
      uint32_t at = base + step % S::STAGES * S::STAGE_BYTES;
      int k = step * DEPTH;
      fetch<N>(at, w + k, a.ldw, a.n - col, a.k - k);
      fetch<ROWS>(at + N * DEPTH * 2, x + k, a.x.stride, tile.rows, a.k - k);
    }
    copy_commit();
  };
  // Two stages ahead: the stage that a copy overwrites was last read two steps ago, and every warpgroup has waited for that.
  constexpr int AHEAD = S::STAGES - 2;
  for (int step = 0; step < AHEAD; ++step) issue(step);
  float acc[HALVES][ROWS / 2] = {};
  for (int step = 0; step < steps; ++step) {
    copy_wait<AHEAD - 1>();
    fence_for_wgmma();
    __syncthreads();
    uint32_t at = base + step % S::STAGES * S::STAGE_BYTES;
    uint64_t rows = descriptor(at + N * DEPTH * 2), outputs = descriptor(at + group * HALVES * 64 * DEPTH * 2);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k)
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
        multiply_64<ROWS>(acc[half], outputs + half * (64 * DEPTH * 2 >> 4) + k * 2, rows + k * 2);
    wgmma_commit();
    issue(step + AHEAD);
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
  int64_t shift = blockIdx.z * a.out_batch;
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    Outputs outputs = outputs_of(a, tile, col + (group * HALVES + half) * 64 + warp * 16, lane);
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        finish(a, tile, outputs, shift, j * 8 + lane % 4 * 2 + e, acc[half][j * 4 + e], acc[half][j * 4 + e + 2]);
  }
#endif
}

template <int ROWS> int launch(const MoeyardGemm& a, void* stream) {
  cudaError_t error =
      cudaFuncSetAttribute(gemm<ROWS>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape<ROWS>::SHARED_BYTES);
  if (error) return int(error);
  dim3 grid(a.row_tiles, (a.n + N - 1) / N, a.batches);
  gemm<ROWS><<<grid, THREADS, Shape<ROWS>::SHARED_BYTES, stream_of(stream)>>>(a);
  return launched();
}

}  // namespace

extern "C" int moeyard_gemm_sm90(const MoeyardGemm* a, void* stream) {
  if (a->row_tiles == 0 || a->n == 0 || a->batches == 0) return 0;
  // Tiles of 192 rows were slower at every shape measured.
  return a->row_tile == 128 ? launch<128>(*a, stream) : int(cudaErrorInvalidValue);
}
