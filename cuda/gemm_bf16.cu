// Products of bf16 on the tensor cores, grouped or not. k runs in steps of 16 in ascending order in every configuration, so all of them
// give an element the same bits, whatever the tile, the group or the rows beside it.
#include "gemm_few.cuh"

using namespace moeyard;

namespace {

template <class S> constexpr int STAGE_BYTES = (S::N + S::R) * DEPTH * 2;

// Fragments of one step of 16 k.
template <class S> struct Fragments {
  uint32_t a[S::TILES_N][4], b[S::TILES_R][2];

  __device__ void load(uint32_t w, uint32_t x, int step) {
    int lane = threadIdx.x % WARP, n0 = first_output<S>();
#pragma unroll
    for (int i = 0; i < S::TILES_N; ++i)
      load_matrix_x4(a[i], swizzled(w, n0 + i * 16 + lane % 16, step * 2 + lane / 16));
    load_rows<S>(b, x, step);
  }
};

// The loads of the whole stage, or of the next step, are under way while a step is multiplied.
template <class S>
__device__ void multiply_stage(float (&acc)[S::TILES_N][S::TILES_R][4], uint32_t w, uint32_t x) {
  constexpr int STEPS = DEPTH / 16, HELD = S::TILES_N == 1 ? STEPS : 2;
  Fragments<S> f[HELD];
#pragma unroll
  for (int step = 0; step < HELD - 1; ++step) f[step].load(w, x, step);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    if (step + HELD - 1 < STEPS) f[(step + HELD - 1) % HELD].load(w, x, step + HELD - 1);
    const Fragments<S>& now = f[step % HELD];
#pragma unroll
    for (int i = 0; i < S::TILES_N; ++i)
#pragma unroll
      for (int j = 0; j < S::TILES_R; ++j) multiply_add(acc[i][j], now.a[i], now.b[j][0], now.b[j][1]);
  }
}

// Whether the first stages of the weights are on their way before the rows are there: with few rows reading weights is all that counts.
template <class S> constexpr bool WEIGHTS_FIRST = S::R <= 16;

template <class S> __global__ void __launch_bounds__(S::THREADS) gemm(MoeyardGemm a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Tile tile = find_tile(a, blockIdx.x, S::R, [&] {
    if (!a.ahead) wait_for_turn();
    let_next_start();
  });
  if (tile.rows == 0) {
    wait_for_turn();
    return;
  }
  int col = blockIdx.y * S::N;
  const bf16* x = static_cast<const bf16*>(a.x.data) + blockIdx.z * a.x_batch + int64_t(tile.row) * a.x.stride;
  const bf16* w = static_cast<const bf16*>(tile.weight) + blockIdx.z * a.w_batch + int64_t(col) * a.ldw;
  uint32_t base = shared_address(shared);
  int steps = (a.k + DEPTH - 1) / DEPTH;
  Source<S::N, S::THREADS> weights(w, a.ldw, a.n - col, a.k);
  Source<S::R, S::THREADS> rows(x, a.x.stride, tile.rows, a.k);
  auto issue = [&](int step) {
    if (step < steps) {
      uint32_t at = base + step % S::STAGES * STAGE_BYTES<S>;
      weights.copy(at);
      rows.copy(at + S::N * DEPTH * 2);
    }
    copy_commit();  // an empty group keeps the count of groups even
  };
  if constexpr (WEIGHTS_FIRST<S>) {
    for (int step = 0; step < S::STAGES - 1; ++step) {
      if (step < steps) weights.copy(base + step * STAGE_BYTES<S>);
      copy_commit();
    }
    wait_for_turn();
    rows.template store<S::STAGES - 1>(base + S::N * DEPTH * 2, STAGE_BYTES<S>);
  } else {
    wait_for_turn();
    for (int step = 0; step < S::STAGES - 1; ++step) issue(step);
  }
  float acc[S::TILES_N][S::TILES_R][4] = {};
  for (int step = 0; step < steps; ++step) {
    copy_wait<S::STAGES - 2>();
    __syncthreads();
    issue(step + S::STAGES - 1);
    uint32_t at = base + step % S::STAGES * STAGE_BYTES<S>;
    multiply_stage<S>(acc, at, at + S::N * DEPTH * 2);
  }
  finish_all<S>(a, tile, col, acc);
}

template <class S> int launch(const MoeyardGemm& a, void* stream) {
  return launch_product<S>(gemm<S>, a, STAGE_BYTES<S> * S::STAGES, stream);
}

template <class Wide, class Narrow> int launch_either(const MoeyardGemm& a, void* stream) {
  return fills_the_gpu<Wide>(a) ? launch<Wide>(a, stream) : launch<Narrow>(a, stream);
}

template <class Wide, class Narrow, class Warps> int launch_decode(const MoeyardGemm& a, void* stream) {
  return few_serves<Warps>(a) ? launch_few<Warps>(a, stream) : launch_either<Wide, Narrow>(a, stream);
}

}  // namespace

extern "C" int moeyard_gemm_bf16(const MoeyardGemm* a, void* stream) {
  if (a->row_tiles == 0 || a->n == 0 || a->batches == 0) return 0;
  switch (a->row_tile) {
    case 8: return launch_decode<Shape<4, 1, 1, 1, 8>, Shape<2, 1, 1, 1, 8>, Few<8, 16>>(*a, stream);
    case 16: return launch_decode<Shape<4, 1, 1, 2, 8>, Shape<2, 1, 1, 2, 8>, Few<16, 8>>(*a, stream);
    case 32: return launch_either<Shape<4, 1, 1, 4, 6>, Shape<2, 1, 1, 4, 6>>(*a, stream);
    case 64: return launch_either<Shape<4, 1, 1, 8, 6>, Shape<2, 2, 1, 4, 6>>(*a, stream);
    case 128: return launch_either<Shape<2, 4, 4, 4, 4>, Shape<2, 4, 2, 4, 4>>(*a, stream);
    default: return int(cudaErrorInvalidValue);
  }
}
