// Grouped products of bf16 on Hopper, made of CUTLASS's pieces: tensor maps and TMA with multicast, mbarriers, warpgroup
// instructions as CuTe atoms. Persistent: one pair of blocks (a cluster) per two multiprocessors walks the tiles of all groups.
//
// A pair computes 2 x 128 outputs of up to 256 rows, or 2 x 64 of up to 64. Both blocks need the same rows, so each copies half of them
// into both. In a block four threads keep the copies running, one or two warpgroups multiply 64 outputs each. A tile with fewer rows is
// multiplied in narrower instructions: what a group has beyond its last full tile is not paid for as a full one.
//
// The weights are the first operand, so a lane holds outputs n and n + 8 of a row, as in all bf16 kernels of moeyard (finish.cuh);
// k ascends in steps of 16 as there, so that the bits are the same.

// Instructions for every multiple of 32 rows.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include "../../cuda/finish.cuh"

#include <cuda.h>

#include "cute/arch/cluster_sm90.hpp"
#include "cute/arch/copy_sm90_desc.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/tensor.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/arch/reg_reconfig.h"

// A named namespace: the host's stub of a kernel breaks in an anonymous one when CuTe's types are near.
namespace moeyard::grouped {

constexpr int DEPTH = 64;  // k per stage: a row of 128 bytes
constexpr int BLOCKS = 2;  // of a cluster
constexpr int GROUP_THREADS = 128;
constexpr int STRIP = 16;  // tiles of rows that are walked for a tile of outputs before the next: they stay in the second-level cache
constexpr int MOST_GROUPS = 1024;
constexpr int ROW_BYTES = DEPTH * 2;
constexpr int MOST_WIDTHS = 8;
constexpr int COPIERS = 4;  // warps; one thread of each works, so that what it takes to start a copy does not hold up the next
// Tiles that a pair has been told of at most: nobody is so many behind who tells. Copies are at most STAGES ahead of products, a copier COPIERS
// more of one that skips the others' stages.
constexpr int TOLD = 32;

// A block: one warpgroup that copies, MULTIPLIERS that multiply 64 outputs each. A tile of rows is up to WIDTHS chunks.
template <int MULTIPLIERS_, int CHUNK_, int WIDTHS_, int STAGES_> struct Form {
  static constexpr int MULTIPLIERS = MULTIPLIERS_, CHUNK = CHUNK_, WIDTHS = WIDTHS_, STAGES = STAGES_;
  static constexpr int THREADS = (1 + MULTIPLIERS) * GROUP_THREADS;
  static constexpr int OUTPUTS = MULTIPLIERS * 64, ROWS = WIDTHS * CHUNK;
  static_assert(WIDTHS <= MOST_WIDTHS);
  static_assert(STAGES % COPIERS == 0, "a stage belongs to one copier");
  static_assert(STAGES + 2 * COPIERS + 1 <= TOLD);
  static constexpr int WEIGHT_BYTES = OUTPUTS * ROW_BYTES, STAGE_BYTES = WEIGHT_BYTES + ROWS * ROW_BYTES;
};
using Wide = Form<2, 32, 8, 4>;   // for arithmetic
using Thin = Form<1, 16, 4, 12>;  // for bandwidth: what is under way counts

// Matrices of one group, as the copy engine sees them: rows in boxes of a block's share of so many chunks and one.
struct alignas(128) Maps {
  CUtensorMap weights, rows[MOST_WIDTHS];
};
// What a launch of several groups keeps in device memory.
struct alignas(128) Working {
  int handed_out;  // tiles, beside the first of every pair
  Maps maps[1];    // as many as there are groups
};
static_assert(offsetof(Working, maps) == 128 && sizeof(Maps) == 1152, "as api.h and cutlass-sys tell");

// One product: rows of one slot, or one of equal products side by side.
struct Group {
  int start, rows;
};
__device__ __forceinline__ Group group_of(const MoeyardGemm& a, int group) {
  if (!a.offsets) return {0, a.x.rows};
  int start = a.offsets[group];
  return {start, a.offsets[group + 1] - start};
}
__host__ __device__ inline int groups_of(const MoeyardGemm& a) { return a.offsets ? a.slots : a.batches; }
__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// How the groups are cut into tiles, the same in every block.
struct Schedule {
  int tile_rows;
  int pairs;               // of tiles of outputs
  int start[MOST_GROUPS];  // first row
  int rows[MOST_GROUPS];
  int first[MOST_GROUPS + 1];  // first tile; the last entry counts all
};

template <class F> struct Shared {
  alignas(1024) unsigned char stages[F::STAGES][F::STAGE_BYTES];
  cutlass::arch::ClusterTransactionBarrier full[F::STAGES];
  cutlass::arch::ClusterBarrier empty[F::STAGES];
  cutlass::arch::ClusterTransactionBarrier told[TOLD];
  int tiles[TOLD];
  Schedule schedule;
};
template <class F> constexpr int SHARED_BYTES = sizeof(Shared<F>) + 1024;
static_assert(SHARED_BYTES<Wide> <= 227 * 1024 && SHARED_BYTES<Thin> <= 227 * 1024, "the shared memory of a multiprocessor");

// Called by the first warp. Wide tiles read their weights once for more rows; narrow ones keep more clusters busy when there is little
// to do. The least estimated time wins: rounds of tiles, times the mean tile and what it costs beside its rows.
template <class F> __device__ __forceinline__ void make_schedule(Schedule& s, const MoeyardGemm& a, int clusters) {
  constexpr int CHUNK = F::CHUNK, WIDTHS = F::WIDTHS, BESIDE = 48;
  int lane = threadIdx.x % WARP, groups = groups_of(a), pairs = divide_up(a.n, F::OUTPUTS * BLOCKS);
  unsigned tiles[WIDTHS] = {};
  for (int g = lane; g < groups; g += WARP) {
    Group group = group_of(a, g);
    s.start[g] = group.start;
    s.rows[g] = group.rows;
#pragma unroll
    for (int w = 0; w < WIDTHS; ++w) tiles[w] += divide_up(group.rows, (w + 1) * CHUNK);
  }
#pragma unroll
  for (int w = 0; w < WIDTHS; ++w) tiles[w] = __reduce_add_sync(FULL, tiles[w]);
  int tile_rows = a.row_tile;
  if (tile_rows == 0) {
    float best = INFINITY;
#pragma unroll
    for (int w = WIDTHS - 1; w >= 0; --w) {
      float rounds = ceilf(float(tiles[w]) * pairs / clusters);
      float time = rounds * (float(tiles[0]) * CHUNK / max(tiles[w], 1u) + BESIDE);
      if (time < best) best = time, tile_rows = (w + 1) * CHUNK;
    }
  }
  __syncwarp();
  int before = 0;
  for (int base = 0; base < groups; base += WARP) {
    int g = base + lane, own = g < groups ? divide_up(s.rows[g], tile_rows) * pairs : 0, sum = own;
    for (int o = 1; o < WARP; o <<= 1) {
      int left = __shfl_up_sync(FULL, sum, o);
      if (lane >= o) sum += left;
    }
    if (g < groups) s.first[g] = before + sum - own;
    before += __shfl_sync(FULL, sum, WARP - 1);
  }
  if (lane == 0) s.first[groups] = before, s.tile_rows = tile_rows, s.pairs = pairs;
}

struct Work {
  int group;
  int row, rows;  // within the group
  int tile;       // of outputs, of this block
};
// The chunks of a group's rows are shared out evenly over its tiles: full tiles and one of a few rows would take as long as one more full one.
template <class F> __device__ __forceinline__ Work work_of(const Schedule& s, int groups, int tile, int rank) {
  int low = 0, high = groups;  // the last group whose first tile is not beyond `tile`
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (s.first[middle] <= tile) low = middle;
    else high = middle;
  }
  int all = s.rows[low], row_tiles = divide_up(all, s.tile_rows), at = tile - s.first[low];
  int strip = at / (STRIP * s.pairs), within = at % (STRIP * s.pairs), width = min(STRIP, row_tiles - strip * STRIP);
  int pair = within / width, row_tile = strip * STRIP + within % width;
  int chunks = divide_up(all, F::CHUNK), each = chunks / row_tiles, more = chunks % row_tiles;
  int row = (row_tile * each + min(row_tile, more)) * F::CHUNK, rows = (each + (row_tile < more)) * F::CHUNK;
  return {low, row, min(rows, all - row), pair * BLOCKS + rank};
}

// Where the ring of stages stands.
template <int STAGES> struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// The tiles of a pair of blocks: of one group every so-many-th; of several, whose tiles differ in rows, the next one that no pair has, so that all
// end together. One thread of the pair takes it and tells both blocks.
struct Tiles {
  int tile;
  unsigned turn = 0;
  template <class F> __device__ __forceinline__ void advance(Shared<F>& shared, bool counted, int clusters) {
    if (!counted) {
      tile += clusters;
      return;
    }
    int slot = turn % TOLD;
    shared.told[slot].wait(turn / TOLD % 2);
    tile = shared.tiles[slot];
    ++turn;
  }
};

// One thread: the weights of the first stages, into the second-level cache.
template <class F>
__device__ __forceinline__ void fetch_ahead(const Shared<F>& shared, const MoeyardGemm& a, const Maps& map, int cluster, int rank) {
  if (cluster >= shared.schedule.first[1]) return;
  Work work = work_of<F>(shared.schedule, 1, cluster, rank);
  for (int step = 0; step < min(F::STAGES, divide_up(a.k, DEPTH)); ++step)
    cute::SM90_TMA_LOAD_2D::PREFETCH::copy(&map.weights, step * DEPTH, work.tile * F::OUTPUTS);
}

// One thread of each copier: keeps its stages filled.
template <class F>
__device__ __forceinline__ void produce(Shared<F>& shared, const MoeyardGemm& a, const Maps& own_maps, Working* working, int cluster,
                                        int clusters, int rank) {
  constexpr auto KEEP = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  constexpr uint16_t BOTH = (1 << BLOCKS) - 1;
  int groups = groups_of(a), steps = divide_up(a.k, DEPTH), copier = threadIdx.x / WARP;
  // The next tile is asked for no earlier than its answer takes: pairs that are slower then come later.
  int asks = copier == 0 && rank == 0 && working ? max(steps - 2 * F::STAGES, 0) : -1, next = 0;
  const CUtensorMap* known = nullptr;
  Ring<F::STAGES> ring;
  for (Tiles tiles{cluster}; tiles.tile < shared.schedule.first[groups]; tiles.advance(shared, working, clusters)) {
    Work work = work_of<F>(shared.schedule, groups, tiles.tile, rank);
    const Maps& map = working ? working->maps[work.group] : own_maps;
    int chunks = divide_up(work.rows, F::CHUNK), own = rank * chunks * (F::CHUNK / BLOCKS);
    const CUtensorMap* rows = &map.rows[chunks - 1];
    if (working && rows != known) {
      cute::tma_descriptor_fence_acquire(&map.weights);
      cute::tma_descriptor_fence_acquire(rows);
      known = rows;
    }
    for (int step = 0; step < steps; ++step, ring.advance()) {
      if (step == asks) next = clusters + atomicAdd(&working->handed_out, 1);
      if (ring.stage % COPIERS != copier) continue;
      shared.empty[ring.stage].wait(ring.phase ^ 1);
      auto& full = shared.full[ring.stage];
      full.arrive_and_expect_tx(F::WEIGHT_BYTES + chunks * F::CHUNK * ROW_BYTES);
      auto* barrier = reinterpret_cast<uint64_t*>(&full);
      unsigned char* to = shared.stages[ring.stage];
      cute::SM90_TMA_LOAD_2D::copy(&map.weights, barrier, KEEP, to, step * DEPTH, work.tile * F::OUTPUTS);
      cute::SM90_TMA_LOAD_MULTICAST_2D::copy(rows, barrier, BOTH, KEEP, to + F::WEIGHT_BYTES + own * ROW_BYTES, step * DEPTH,
                                             work.row + own);
    }
    if (!working || copier > 0) continue;
    int slot = tiles.turn % TOLD;
    shared.told[slot].arrive_and_expect_tx(sizeof(int));
    if (rank > 0) continue;
    for (int block = 0; block < BLOCKS; ++block)
      cute::store_shared_remote(next, cute::cast_smem_ptr_to_uint(&shared.tiles[slot]), cute::cast_smem_ptr_to_uint(&shared.told[slot]), block);
  }
}

__device__ __forceinline__ uint32_t transposed(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t from = reinterpret_cast<uint32_t&>(pair), to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(to) : "r"(from));
  return to;
}

// Lanes hold a row of two 8 x 8 matrices each, two columns of it. Afterwards even lanes hold four columns of `first`, odd ones of `second`.
__device__ __forceinline__ uint2 exchanged(uint32_t first, uint32_t second) {
  bool odd = threadIdx.x % 2;
  uint32_t got = __shfl_xor_sync(FULL, odd ? first : second, 1);
  return odd ? make_uint2(got, second) : make_uint2(first, got);
}

// Whether outputs are bf16 and lie in steps of four; with an activation they must.
__host__ __device__ inline bool in_fours(const MoeyardGemm& a) {
  bool batches = a.batches == 1 || a.out_batch % 4 == 0;
  return a.out.type == MOEYARD_BF16 && a.n % 16 == 0 && reinterpret_cast<uintptr_t>(a.out.data) % 8 == 0 &&
         a.out.stride % 4 == 0 && batches;
}

// The reciprocal of a number from 1 to 2^125, rounded as a division rounds it: what the compiler does there, without a branch, so that
// many are under way together.
__device__ __forceinline__ float reciprocal(float y) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(y));
  return fmaf(r, -fmaf(y, r, -1.0f), r);
}

// gate[i] = activate(gate[i], up[i]), the same bits.
template <bool CLAMPED, int COUNT>
__device__ __forceinline__ void activate_all(const MoeyardGemm& a, float (&gate)[COUNT], const float (&up)[COUNT]) {
  float sigmoids[COUNT];
  bool far = false;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (CLAMPED) gate[i] = fminf(gate[i], a.limit);
    sigmoids[i] = 1.0f + expf(-(CLAMPED ? a.alpha * gate[i] : gate[i]));
    far |= !(sigmoids[i] < 0x1p125f);
  }
  if (far) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sigmoids[i] = 1.0f / sigmoids[i];
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sigmoids[i] = reciprocal(sigmoids[i]);
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (CLAMPED) gate[i] = gate[i] * sigmoids[i] * (fminf(fmaxf(up[i], -a.limit), a.limit) + 1.0f);
    else gate[i] = gate[i] * sigmoids[i] * up[i];
  }
}

// A warp's 16 outputs of some rows of a tile, on their way out.
struct Ending {
  Outputs outputs;
  int first;  // output
  int64_t shift;
};

// bf16 in fours: a lane's columns become rows of the output first, eight bytes a store. `sums` are of WIDTH rows from `row` on.
template <int WIDTH, bool CLAMPED, class Sums>
__device__ __forceinline__ void finish_gated(const MoeyardGemm& a, const Tile& tile, const Ending& end, int row, const Sums& sums) {
  int lane = threadIdx.x % WARP, odd = lane % 2;
  float gate[WIDTH / 4], up[WIDTH / 4];
#pragma unroll
  for (int i = 0; i < WIDTH / 4; ++i) {
    gate[i] = sums[i / 2 * 4 + i % 2] + end.outputs.low;
    up[i] = sums[i / 2 * 4 + i % 2 + 2] + end.outputs.high;
  }
  activate_all<CLAMPED>(a, gate, up);
  auto* out = static_cast<bf16*>(a.out.data) + end.shift + end.first / 2 + lane % 4 / 2 * 4;
  row += odd * 8 + lane / 4;
#pragma unroll
  for (int i = 0; i < WIDTH / 4; i += 4, row += 16) {
    uint2 value = exchanged(transposed(gate[i], gate[i + 1]), transposed(gate[i + 2], gate[i + 3]));
    if (row < tile.rows) *reinterpret_cast<uint2*>(out + int64_t(tile.row + row) * a.out.stride) = value;
  }
}
template <int WIDTH, class Sums>
__device__ __forceinline__ void finish_plain(const MoeyardGemm& a, const Tile& tile, const Ending& end, int row, const Sums& sums) {
  int lane = threadIdx.x % WARP;
  auto* out = static_cast<bf16*>(a.out.data) + end.shift + end.first + lane % 2 * 8 + lane % 4 / 2 * 4;
  row += lane / 4;
#pragma unroll
  for (int j = 0; j < WIDTH / 8; ++j, row += 8) {
    uint32_t low = transposed(sums[j * 4] + end.outputs.low, sums[j * 4 + 1] + end.outputs.low);
    uint32_t high = transposed(sums[j * 4 + 2] + end.outputs.high, sums[j * 4 + 3] + end.outputs.high);
    uint2 value = exchanged(low, high);
    if (row < tile.rows) *reinterpret_cast<uint2*>(out + int64_t(tile.row + row) * a.out.stride) = value;
  }
}
// Outputs that lie anyhow.
template <class T, int WIDTH, class Sums>
__device__ __forceinline__ void finish_anyhow(const MoeyardGemm& a, const Tile& tile, const Ending& end, int row, const Sums& sums) {
  int lane = threadIdx.x % WARP;
  bool low = end.outputs.n < a.n, high = end.outputs.n + 8 < a.n;
  row += lane % 4 * 2;
  T* out = static_cast<T*>(a.out.data) + end.shift + end.outputs.n + int64_t(tile.row + row) * a.out.stride;
#pragma unroll
  for (int j = 0; j < WIDTH / 8; ++j, row += 8, out += 8 * a.out.stride)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      T* at = out + e * a.out.stride;
      bool here = row + e < tile.rows;
      if (here && low) at[0] = narrow<T>(sums[j * 4 + e] + end.outputs.low);
      if (here && high) at[8] = narrow<T>(sums[j * 4 + e + 2] + end.outputs.high);
    }
}

// As a loop over chunks: unrolled it would be more code than the instruction cache holds. The registers that the loop reads are always the
// same; the others move up.
template <int WIDTH, class Sums>
__device__ __forceinline__ void finish_tile(const MoeyardGemm& a, const Tile& tile, const Ending& end, const Sums& sums) {
  constexpr int CHUNK = WIDTH % 64 == 0 ? 64 : WIDTH % 32 == 0 ? 32 : 16;
  bool fours = in_fours(a);
  float held[WIDTH / 2];
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) held[i] = sums(i);
#pragma unroll 1
  for (int row = 0; row < WIDTH; row += CHUNK) {
    if (a.activation == MOEYARD_SILU_MUL) finish_gated<CHUNK, false>(a, tile, end, row, held);
    else if (a.activation) finish_gated<CHUNK, true>(a, tile, end, row, held);
    else if (fours) finish_plain<CHUNK>(a, tile, end, row, held);
    else if (a.out.type == MOEYARD_F32) finish_anyhow<float, CHUNK>(a, tile, end, row, held);
    else finish_anyhow<bf16, CHUNK>(a, tile, end, row, held);
#pragma unroll
    for (int i = 0; i + CHUNK / 2 < WIDTH / 2; ++i) held[i] = held[i + CHUNK / 2];
  }
}

// One tile of a warpgroup: 64 outputs by WIDTH rows.
template <class F, int WIDTH>
__device__ __forceinline__ void multiply(Shared<F>& shared, Ring<F::STAGES>& ring, const MoeyardGemm& a, const Work& work, const Tile& tile, int64_t shift,
                         int part) {
  using namespace cute;
  using Element = cute::bfloat16_t;
  using Atom = decltype(GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<WIDTH>, Int<DEPTH>>, GMMA::Major::K,
                                             GMMA::Major::K>());
  auto layout = [](auto rows) { return tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, Shape<decltype(rows), Int<DEPTH>>{}); };
  auto mma = make_tiled_mma(Atom{});
  int thread = threadIdx.x % GROUP_THREADS;
  auto slice = mma.get_thread_slice(thread);
  Tensor sums = partition_fragment_C(mma, Shape<_64, Int<WIDTH>>{});
  // Both blocks may fill a stage again only when both have read it: multicast writes to both.
  auto release = [&](int stage) {
    if (thread % (GROUP_THREADS / BLOCKS) == 0) shared.empty[stage].arrive(thread / (GROUP_THREADS / BLOCKS));
  };
  mma.accumulate_ = GMMA::ScaleOut::Zero;
  int steps = divide_up(a.k, DEPTH), last = 0;
  for (int step = 0; step < steps; ++step) {
    unsigned char* stage = shared.stages[ring.stage];
    Tensor weights = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(stage + part * 64 * ROW_BYTES)), layout(_64{}));
    Tensor rows = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(stage + F::WEIGHT_BYTES)), layout(Int<WIDTH>{}));
    Tensor first = slice.make_fragment_A(slice.partition_A(weights));
    Tensor second = slice.make_fragment_B(slice.partition_B(rows));
    shared.full[ring.stage].wait(ring.phase);
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < size<2>(first); ++k) {
      gemm(mma, first(_, _, k), second(_, _, k), sums);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_wait<1>();
    warpgroup_fence_operand(sums);
    if (step > 0) release(last);
    last = ring.stage;
    ring.advance();
  }
  warpgroup_wait<0>();
  warpgroup_fence_operand(sums);
  release(last);

  int lane = threadIdx.x % WARP, output = work.tile * F::OUTPUTS + part * 64 + thread / WARP * 16;
  if (output >= a.n) return;
  finish_tile<WIDTH>(a, tile, Ending{outputs_of(a, tile, output, lane), output, shift}, sums);
}

template <class F>
__device__ __forceinline__ void consume(Shared<F>& shared, const MoeyardGemm& a, bool counted, int cluster, int clusters, int rank) {
  int groups = groups_of(a), part = int(threadIdx.x) / GROUP_THREADS - 1;
  Ring<F::STAGES> ring;
  for (Tiles tiles{cluster}; tiles.tile < shared.schedule.first[groups]; tiles.advance(shared, counted, clusters)) {
    Work work = work_of<F>(shared.schedule, groups, tiles.tile, rank);
    Tile place = {a.offsets ? work.group : 0, shared.schedule.start[work.group] + work.row, work.rows};
    int64_t shift = a.offsets ? 0 : work.group * a.out_batch;
    auto of = [&](auto chunks) {
      constexpr int CHUNKS = decltype(chunks)::value;
      if constexpr (CHUNKS <= F::WIDTHS) multiply<F, CHUNKS * F::CHUNK>(shared, ring, a, work, place, shift, part);
    };
    switch (divide_up(work.rows, F::CHUNK)) {
      case 1: of(std::integral_constant<int, 1>{}); break;
      case 2: of(std::integral_constant<int, 2>{}); break;
      case 3: of(std::integral_constant<int, 3>{}); break;
      case 4: of(std::integral_constant<int, 4>{}); break;
      case 5: of(std::integral_constant<int, 5>{}); break;
      case 6: of(std::integral_constant<int, 6>{}); break;
      case 7: of(std::integral_constant<int, 7>{}); break;
      default: of(std::integral_constant<int, 8>{});
    }
  }
}

// Where there are no clusters, the kernel is empty and never launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define MOEYARD_CLUSTER
#else
#define MOEYARD_CLUSTER __cluster_dims__(BLOCKS, 1, 1)
#endif

// With `working` null there is one group, and `own` are its maps.
template <class F>
__global__ void MOEYARD_CLUSTER __launch_bounds__(F::THREADS, 1)
    gemm(const __grid_constant__ MoeyardGemm a, const __grid_constant__ Maps own, Working* working) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char memory[];
  // The same distance in both blocks of a cluster.
  auto address = uint32_t(__cvta_generic_to_shared(memory));
  auto& shared = *reinterpret_cast<Shared<F>*>(memory + (1024 - address % 1024) % 1024);
  int rank = int(cute::block_rank_in_cluster()), cluster = blockIdx.x / BLOCKS, clusters = gridDim.x / BLOCKS;
  if (threadIdx.x < WARP) make_schedule<F>(shared.schedule, a, clusters);
  if (threadIdx.x == WARP) {
    for (int i = 0; i < F::STAGES; ++i) {
      shared.full[i].init(1);
      shared.empty[i].init(BLOCKS * F::MULTIPLIERS);
    }
    for (auto& told : shared.told) told.init(1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  cute::cluster_sync();
  // All above, and what only warms a cache, may run while the kernel before ends; what reads or writes memory may not.
  if (!working && threadIdx.x == 0) fetch_ahead<F>(shared, a, own, cluster, rank);
  __syncwarp();
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
  // With one multiplying warpgroup there are registers for all.
  constexpr bool SHIFT = F::MULTIPLIERS > 1;
  if (threadIdx.x < GROUP_THREADS) {
    if constexpr (SHIFT) cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x % WARP == 0) produce<F>(shared, a, own, working, cluster, clusters, rank);
    __syncwarp();
  } else {
    if constexpr (SHIFT) cutlass::arch::warpgroup_reg_alloc<232>();
    consume<F>(shared, a, working != nullptr, cluster, clusters, rank);
  }
  // The other block may still write here or signal a barrier of this one.
  cute::cluster_sync();
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ void point(cute::TmaDescriptor& map, const void* data, int k, int rows, int64_t stride) {
  cute::tma_descriptor_replace_addr_in_shared_mem(map, data);
  auto at = uint64_t(__cvta_generic_to_shared(&map));
  asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 0, %1;\n" ::"l"(at), "r"(k));
  asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 1, %1;\n" ::"l"(at), "r"(rows));
  asm volatile("tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%0], 0, %1;\n" ::"l"(at), "l"(stride * 2));
}
#endif

// A warp for each group: the maps that only the offsets tell, of so many widths of tiles. And no tile has been handed out.
__global__ void __launch_bounds__(WARP) describe(const __grid_constant__ MoeyardGemm a, const __grid_constant__ Maps pattern, int widths,
                                                 Working* working) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ Maps made;
  int group = blockIdx.x, lane = threadIdx.x;
  if (group == 0 && lane == 0) working->handed_out = 0;
  Group rows = group_of(a, group);
  if (rows.rows == 0) return;
  int64_t batch = a.offsets ? 0 : group;
  if (lane < widths) {
    made.rows[lane] = pattern.rows[lane];
    const bf16* x = static_cast<const bf16*>(a.x.data) + batch * a.x_batch + int64_t(rows.start) * a.x.stride;
    point(made.rows[lane], x, a.k, rows.rows, a.x.stride);
  } else if (lane == widths) {
    made.weights = pattern.weights;
    const void* weight = a.offsets ? a.weights[group] : a.weight;
    point(made.weights, static_cast<const bf16*>(weight) + batch * a.w_batch, a.k, a.n, a.ldw);
  }
  __syncwarp();
  Maps& maps = working->maps[group];
  cute::tma_descriptor_cp_fence_release(&maps.weights, made.weights);
  for (int i = 0; i < widths; ++i) cute::tma_descriptor_cp_fence_release(&maps.rows[i], made.rows[i]);
#endif
}

// Of row-major bf16, `stride` elements from one row to the next, copied in boxes of `box` rows by DEPTH.
inline int make_map(CUtensorMap* map, const void* data, int k, int rows, int64_t stride, int box) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult outcome{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &outcome);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (!encode) return cudaErrorNotSupported;
  cuuint64_t dims[2] = {cuuint64_t(k), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
  cuuint32_t boxes[2] = {DEPTH, cuuint32_t(box)}, steps[2] = {1, 1};
  CUresult made = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), dims, strides, boxes, steps,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class F> int launch(const MoeyardGroupedGemm& args, cudaStream_t stream) {
  const MoeyardGemm& a = args.product;
  int groups = groups_of(a);
  bool fits = groups <= MOST_GROUPS && a.k > 0 && a.row_tile % F::CHUNK == 0 && a.row_tile <= F::ROWS && (!a.offsets || a.batches == 1) &&
              (!a.activation || in_fours(a));
  if (!fits) return cudaErrorInvalidValue;
  if (groups == 0 || a.n == 0 || a.x.rows == 0) return cudaSuccess;
  int device = 0, processors = 0;
  if (int error = cudaGetDevice(&device)) return error;
  if (int error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (int error = cudaFuncSetAttribute(gemm<F>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES<F>)) return error;
  bool single = !a.offsets && groups == 1;
  // The first group's, or a pattern for those that are made where the offsets are.
  Maps own{};
  const void* weight = single ? a.weight : args.working;
  if (int error = make_map(&own.weights, weight, a.k, a.n, a.ldw, F::OUTPUTS)) return error;
  for (int i = 0; i < F::WIDTHS; ++i)
    if (int error = make_map(&own.rows[i], a.x.data, a.k, a.x.rows, a.x.stride, (i + 1) * F::CHUNK / BLOCKS)) return error;
  auto* working = single ? nullptr : static_cast<Working*>(args.working);
  if (!single) describe<<<groups, WARP, 0, stream>>>(a, own, F::WIDTHS, working);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = single;  // else the first thing read is what `describe` wrote
  cudaLaunchConfig_t config{};
  config.gridDim = processors / BLOCKS * BLOCKS;
  config.blockDim = F::THREADS;
  config.dynamicSmemBytes = SHARED_BYTES<F>;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, gemm<F>, a, own, working);
}

}  // namespace moeyard::grouped

extern "C" int moeyard_gemm_grouped(const MoeyardGroupedGemm* args, void* stream) {
  using namespace moeyard;
  return args->form == MOEYARD_THIN ? grouped::launch<grouped::Thin>(*args, stream_of(stream))
                                    : grouped::launch<grouped::Wide>(*args, stream_of(stream));
}
