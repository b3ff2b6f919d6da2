// The prefill tile of products on Hopper: the layout, the order of k and the lanes' outputs of gemm_bf16.cu with the warpgroup
// instructions of sm_90a. tests/gpu compares the bits of both.
#include "finish.cuh"
#include "groups.cuh"
#include "source.cuh"
#include "wgmma.cuh"

using namespace moeyard;

namespace {

constexpr int GROUPS = 2;  // warpgroups
constexpr int HALVES = 2;  // tiles of 64 outputs of each
constexpr int N = GROUPS * HALVES * 64, THREADS = GROUPS * 128;
constexpr int STRIP = 16;  // tiles of outputs

// ROWS rows of x by 256 outputs.
template <int ROWS> struct Shape {
  static constexpr int STAGES = 4;
  static constexpr int STAGE_BYTES = (N + ROWS) * DEPTH * 2;
  static constexpr int SHARED_BYTES = STAGE_BYTES * STAGES + 1024;
};

// Blocks that run together shall find their rows and weights in the second-level cache: they walk all tiles of rows for a strip of
// tiles of outputs, then the next strip.
struct Place {
  int row_tile, col_tile;
};
__device__ Place place_of(int block, int row_tiles, int col_tiles) {
  int strip = block / (row_tiles * STRIP), within = block % (row_tiles * STRIP);
  int width = min(STRIP, col_tiles - strip * STRIP);
  return {within / width, strip * STRIP + within % width};
}

template <int ROWS> __global__ void __launch_bounds__(THREADS, 1) gemm(MoeyardGemm a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<ROWS>;
  extern __shared__ unsigned char shared[];
  Place place = place_of(blockIdx.x, a.row_tiles, (a.n + N - 1) / N);
  Tile tile = find_tile(a, place.row_tile, ROWS);
  if (tile.rows == 0) return;
  int col = place.col_tile * N, group = threadIdx.x / 128;
  const bf16* x = static_cast<const bf16*>(a.x.data) + blockIdx.z * a.x_batch + int64_t(tile.row) * a.x.stride;
  const bf16* w = static_cast<const bf16*>(weight_of(a, tile)) + blockIdx.z * a.w_batch + int64_t(col) * a.ldw;
  uint32_t base = (shared_address(shared) + 1023) / 1024 * 1024;
  int steps = (a.k + DEPTH - 1) / DEPTH;
  Source<N, THREADS> weights(w, a.ldw, a.n - col, a.k);
  Source<ROWS, THREADS> inputs(x, a.x.stride, tile.rows, a.k);
  auto issue = [&](int step) {
    if (step < steps) {
      uint32_t at = base + step % S::STAGES * S::STAGE_BYTES;
      weights.copy(at);
      inputs.copy(at + N * DEPTH * 2);
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
  dim3 grid(a.row_tiles * ((a.n + N - 1) / N), 1, a.batches);
  gemm<ROWS><<<grid, THREADS, Shape<ROWS>::SHARED_BYTES, stream_of(stream)>>>(a);
  return launched();
}

}  // namespace

extern "C" int moeyard_gemm_sm90(const MoeyardGemm* a, void* stream) {
  if (a->row_tiles == 0 || a->n == 0 || a->batches == 0) return 0;
  // Tiles of 192 rows were slower at every shape measured.
  return a->row_tile == 128 ? launch<128>(*a, stream) : int(cudaErrorInvalidValue);
}
