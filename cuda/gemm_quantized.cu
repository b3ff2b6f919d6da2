// Products of bf16 rows with weights in 8 or 4 bits, grouped or not. The codes travel as they are, through shared memory into registers,
// and become bf16 there: few rows take the time of reading codes. k runs in steps of 16 in ascending order, so an element has the bits
// that gemm_bf16.cu gives it from weights that were rounded beforehand.
//
// Many rows use the same kernel in larger tiles: a warp turns a weight into bf16 once for 64 rows. A second, bf16 copy of the experts at
// work for the kernels of cutlass-sys would need the memory that quantising them saved.
#include "codes.cuh"
#include "shape.cuh"

using namespace moeyard;

namespace {

// In a stage, rows of 128 k as two stages of gemm_bf16.cu's depth, then weight tiles.
template <class S> constexpr int ROW_BYTES = S::R * TILE_DEPTH * 2;
template <class S> constexpr int TILES = S::N / TILE_OUTPUTS;
template <class S, class C> constexpr int STAGE_BYTES = ROW_BYTES<S> + TILES<S> * C::BYTES;

// A warp's share of a stage's copies of weight tiles: one tile, or none.
template <class S, class C> struct TileSource {
  static constexpr int CHUNKS = C::BYTES / 16;
  static_assert(TILES<S> * WARP <= S::THREADS, "a tile for a warp");
  const unsigned char* at;
  int tile;

  // `exist` rows of tiles are in the matrix, `stride` bytes apart. Beyond, the last is copied again: nobody stores what comes of it.
  __device__ TileSource(const unsigned char* from, int64_t stride, int exist) : tile(threadIdx.x / WARP) {
    at = from + min(tile, exist - 1) * stride + threadIdx.x % WARP * 16;
  }

  // The next 128 k.
  __device__ void copy(uint32_t stage) {
    if (TILES<S> * WARP < S::THREADS && tile >= TILES<S>) return;
    int lane = threadIdx.x % WARP;
    uint32_t to = stage + tile * C::BYTES + lane * 16;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += WARP)
      if (chunk + WARP <= CHUNKS || chunk + lane < CHUNKS) copy_async(to + chunk * 16, at + chunk * 16, true);
    at += C::BYTES;
  }
};

template <class S, class C>
__device__ void multiply_stage(float (&acc)[S::TILES_N][S::TILES_R][4], uint32_t x, uint32_t w) {
  int lane = threadIdx.x % WARP;
  w += first_output<S>() / TILE_OUTPUTS * C::BYTES;
  C scales[S::TILES_N];
#pragma unroll
  for (int i = 0; i < S::TILES_N; ++i) scales[i].load(w + i * C::BYTES, lane);
  // Where a warp has more to hold, the next codes wait.
#pragma unroll(S::TILES_N == 1 ? TILE_STEPS / C::STEPS : 1)
  for (int first = 0; first < TILE_STEPS; first += C::STEPS) {
    uint32_t codes[S::TILES_N][4];
#pragma unroll
    for (int i = 0; i < S::TILES_N; ++i)
      load_shared_x4(codes[i], w + i * C::BYTES + (first / C::STEPS * WARP + lane) * 16);
#pragma unroll
    for (int step = 0; step < C::STEPS; ++step) {
      constexpr int HALF = TILE_STEPS / 2;
      uint32_t b[S::TILES_R][2];
      load_rows<S>(b, x + (first + step) / HALF * (ROW_BYTES<S> / 2), (first + step) % HALF);
#pragma unroll
      for (int i = 0; i < S::TILES_N; ++i) {
        uint32_t a[4];
        scales[i].weights(a, codes[i], step);
#pragma unroll
        for (int j = 0; j < S::TILES_R; ++j) multiply_add(acc[i][j], a, b[j][0], b[j][1]);
      }
    }
  }
}

template <class S, class C> __global__ void __launch_bounds__(S::THREADS, 1) gemm(MoeyardGemm a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Tile tile = find_tile(a, blockIdx.x, S::R, [] {
    wait_for_turn();
    let_next_start();
  });
  if (tile.rows == 0) return;
  int col = blockIdx.y * S::N, first = blockIdx.y * TILES<S>;
  const bf16* x = static_cast<const bf16*>(a.x.data) + int64_t(tile.row) * a.x.stride;
  const unsigned char* w = static_cast<const unsigned char*>(tile.weight) + int64_t(first) * a.ldw;
  uint32_t base = shared_address(shared);
  int steps = (a.k + TILE_DEPTH - 1) / TILE_DEPTH;
  TileSource<S, C> weights(w, a.ldw, (a.n + TILE_OUTPUTS - 1) / TILE_OUTPUTS - first);
  Source<S::R, S::THREADS> rows(x, a.x.stride, tile.rows, a.k);
  // Stages are filled and emptied in turn.
  uint32_t end = base + S::STAGES * STAGE_BYTES<S, C>, full = base, empty = base;
  auto follow = [&](uint32_t& stage) {
    stage += STAGE_BYTES<S, C>;
    if (stage == end) stage = base;
  };
  auto issue = [&](int step) {
    if (step < steps) {
      rows.copy(empty);
      rows.copy(empty + ROW_BYTES<S> / 2);
      weights.copy(empty + ROW_BYTES<S>);
      follow(empty);
    }
    copy_commit();  // an empty group keeps the count of groups even
  };
  for (int step = 0; step < S::STAGES - 1; ++step) issue(step);
  float acc[S::TILES_N][S::TILES_R][4] = {};
  for (int step = 0; step < steps; ++step) {
    copy_wait<S::STAGES - 2>();
    __syncthreads();
    issue(step + S::STAGES - 1);
    multiply_stage<S, C>(acc, full, full + ROW_BYTES<S>);
    follow(full);
  }
  finish_all<S>(a, tile, col, acc);
}

template <class S, class C> int launch(const MoeyardGemm& a, void* stream) {
  return launch_product<S>(gemm<S, C>, a, STAGE_BYTES<S, C> * S::STAGES, stream);
}

template <class C, class Wide, class Narrow> int launch_either(const MoeyardGemm& a, void* stream) {
  return fills_the_gpu<Wide>(a) ? launch<Wide, C>(a, stream) : launch<Narrow, C>(a, stream);
}

template <class C> int launch_for(const MoeyardGemm& a, void* stream) {
  constexpr int DEEP = C::STAGES;
  switch (a.row_tile) {
    case 8: return launch_either<C, Shape<4, 1, 1, 1, DEEP>, Shape<2, 1, 1, 1, DEEP>>(a, stream);
    case 16: return launch_either<C, Shape<4, 1, 1, 2, DEEP>, Shape<2, 1, 1, 2, DEEP>>(a, stream);
    case 32: return launch_either<C, Shape<4, 1, 1, 4, 4>, Shape<2, 1, 1, 4, 4>>(a, stream);
    case 64: return launch_either<C, Shape<4, 1, 1, 8, 3>, Shape<2, 2, 1, 4, 3>>(a, stream);
    case 128: return launch_either<C, Shape<4, 2, 2, 8, 2>, Shape<4, 2, 1, 8, 2>>(a, stream);
    default: return int(cudaErrorInvalidValue);
  }
}

}  // namespace

extern "C" int moeyard_gemm_quantized(const MoeyardGemm* a, void* stream) {
  if (a->row_tiles == 0 || a->n == 0) return 0;
  switch (a->w_type) {
    case MOEYARD_F8: return launch_for<Fp8>(*a, stream);
    case MOEYARD_I4X2: return launch_for<Int4>(*a, stream);
    default: return int(cudaErrorInvalidValue);
  }
}
