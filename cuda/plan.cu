// Where the rows of a rank go that holds every expert once: a stable counting sort of its choices by slot. The warps of a block
// and the blocks of a grid count consecutive choices, so the order is that of (slot, token, k) however many there are.
#include "copy_row.cuh"

#include <climits>

using namespace moeyard;

namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP, EACH = MOEYARD_PLAN_CHUNK / THREADS;

struct Choices {
  int first, end;  // of this block
};

__device__ Choices choices_of_block(const MoeyardPlan& a) {
  int first = blockIdx.x * MOEYARD_PLAN_CHUNK;
  return {first, min(first + MOEYARD_PLAN_CHUNK, a.ids.rows * a.ids.cols)};
}

// This thread's choice number i: a warp has consecutive ones.
__device__ int choice_of(const Choices& c, int i) {
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  return c.first + (warp * EACH + i) * WARP + lane;
}

__device__ int slot_of(const MoeyardPlan& a, int choice) {
  int token = choice / a.ids.cols, j = choice % a.ids.cols;
  return int(a.slot_of[static_cast<const int32_t*>(a.ids.data)[token * a.ids.stride + j]]);
}

// counts[w * slots + s] = choices of warp w for slot s.
__device__ void count(const MoeyardPlan& a, const Choices& c, int* counts) {
  for (int i = threadIdx.x; i < WARPS * a.slots; i += THREADS) counts[i] = 0;
  __syncthreads();
  int* own = counts + threadIdx.x / WARP * a.slots;
  for (int i = 0; i < EACH; ++i) {
    int choice = choice_of(c, i);
    if (choice < c.end) atomicAdd(&own[slot_of(a, choice)], 1);
  }
  __syncthreads();
}

// counts[w * slots + s] becomes the number of choices of earlier warps. Returns the block's own; called for one slot by one thread.
__device__ int before_warps(const MoeyardPlan& a, int* counts, int slot) {
  int sum = 0;
  for (int w = 0; w < WARPS; ++w) {
    int own = counts[w * a.slots + slot];
    counts[w * a.slots + slot] = sum;
    sum += own;
  }
  return sum;
}

// offsets from the rows of each slot; called by the whole block.
__device__ void scan_slots(const MoeyardPlan& a, int* totals, bool writes) {
  __syncthreads();
  if (threadIdx.x < WARP) {
    int before = 0;
    for (int base = 0; base < a.slots; base += WARP) {
      int slot = base + int(threadIdx.x);
      int own = slot < a.slots ? totals[slot] : 0, sum = own;
      for (int o = 1; o < WARP; o <<= 1) {
        int left = __shfl_up_sync(FULL, sum, o);
        if (int(threadIdx.x) >= o) sum += left;
      }
      if (slot < a.slots) {
        totals[slot] = before + sum - own;
        if (writes) a.offsets[slot] = totals[slot];
      }
      before += __shfl_sync(FULL, sum, WARP - 1);
    }
    if (writes && threadIdx.x == 0) a.offsets[a.slots] = before;
  }
  __syncthreads();
}

// Gives every choice of the block its row, and keeps it in `rows` if that is given. cursors[w * slots + s] + base[s] is where warp w's
// next row for slot s goes.
__device__ void place(const MoeyardPlan& a, const Choices& c, int* cursors, const int* base, bool writes, int* rows) {
  int lane = threadIdx.x % WARP;
  int* own = cursors + threadIdx.x / WARP * a.slots;
  for (int i = 0; i < EACH; ++i) {
    int choice = choice_of(c, i), slot = choice < c.end ? slot_of(a, choice) : -1;
    unsigned peers = __match_any_sync(FULL, slot);
    int earlier = __popc(peers & ((1u << lane) - 1));
    if (slot >= 0) {
      int row = base[slot] + own[slot] + earlier;
      if (writes) {
        a.tokens[row] = uint32_t(choice / a.ids.cols);
        a.rows[choice] = uint32_t(row);
      }
      if (rows) rows[choice - c.first] = row;
    }
    __syncwarp();
    if (slot >= 0 && earlier == 0) own[slot] += __popc(peers);
    __syncwarp();
  }
}

// All of it, for as many choices as a warp has lanes: every warp plans for itself, the first block writes the plan down, and each block
// copies a row.
__global__ void __launch_bounds__(THREADS) plan_few(MoeyardPlan a, int words) {
  int lane = threadIdx.x % WARP, choices = a.ids.rows * a.ids.cols;
  to_cache(a.slot_of, 1);
  start_in_turn();
  int slot = lane < choices ? slot_of(a, lane) : INT_MAX, row = 0;
  for (int i = 0; i < choices; ++i) {
    int other = __shfl_sync(FULL, slot, i);
    row += other < slot || (other == slot && i < lane);
  }
  if (blockIdx.x == 0) {
    for (int base = threadIdx.x - lane; base <= a.slots; base += THREADS) {
      int before = 0;
      for (int i = 0; i < choices; ++i) before += __shfl_sync(FULL, slot, i) < base + lane;
      if (base + lane <= a.slots) a.offsets[base + lane] = before;
    }
    if (threadIdx.x < choices) {
      a.tokens[row] = uint32_t(lane / a.ids.cols);
      a.rows[lane] = uint32_t(row);
    }
  }
  int choice = blockIdx.x;
  copy_row(a.x, choice / a.ids.cols, a.grouped, __shfl_sync(FULL, row, choice), words);
}

// All of it, for what one block holds: every block plans for itself, the first writes the plan down, and each copies some rows.
__global__ void __launch_bounds__(THREADS) plan_whole(MoeyardPlan a, int words) {
  extern __shared__ int shared[];
  int *counts = shared, *base = counts + WARPS * a.slots, *rows = base + a.slots;
  Choices c = {0, a.ids.rows * a.ids.cols};
  to_cache(a.slot_of, 1);
  start_in_turn();
  count(a, c, counts);
  for (int s = threadIdx.x; s < a.slots; s += THREADS) base[s] = before_warps(a, counts, s);
  scan_slots(a, base, blockIdx.x == 0);
  place(a, c, counts, base, blockIdx.x == 0, rows);
  __syncthreads();
  for (int choice = blockIdx.x; choice < c.end; choice += gridDim.x) copy_row(a.x, choice / a.ids.cols, a.grouped, rows[choice], words);
}

__global__ void __launch_bounds__(THREADS) gather(MoeyardPlan a, int words) {
  start_in_turn();
  copy_row(a.x, a.tokens[blockIdx.x], a.grouped, blockIdx.x, words);
}

__global__ void __launch_bounds__(THREADS) plan_count(MoeyardPlan a) {
  extern __shared__ int shared[];
  start_in_turn();
  count(a, choices_of_block(a), shared);
  for (int s = threadIdx.x; s < a.slots; s += THREADS) a.counts[int64_t(blockIdx.x) * a.slots + s] = before_warps(a, shared, s);
}

// counts[b * slots + s] becomes the number of choices of earlier blocks.
__global__ void __launch_bounds__(THREADS) plan_scan(MoeyardPlan a, int blocks) {
  extern __shared__ int totals[];
  constexpr int AHEAD = 16;  // loads under way at once
  start_in_turn();
  for (int s = threadIdx.x; s < a.slots; s += THREADS) {
    int sum = 0;
    for (int b = 0; b < blocks; b += AHEAD) {
      int own[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) own[i] = b + i < blocks ? a.counts[int64_t(b + i) * a.slots + s] : 0;
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (b + i < blocks) a.counts[int64_t(b + i) * a.slots + s] = sum;
        sum += own[i];
      }
    }
    totals[s] = sum;
  }
  scan_slots(a, totals, true);
}

__global__ void __launch_bounds__(THREADS) plan_place(MoeyardPlan a) {
  extern __shared__ int shared[];
  int *counts = shared, *base = shared + WARPS * a.slots;
  Choices c = choices_of_block(a);
  start_in_turn();
  count(a, c, counts);
  for (int s = threadIdx.x; s < a.slots; s += THREADS) {
    before_warps(a, counts, s);
    base[s] = a.offsets[s] + a.counts[int64_t(blockIdx.x) * a.slots + s];
  }
  __syncthreads();
  place(a, c, counts, base, true, nullptr);
}

}  // namespace

extern "C" int moeyard_plan(const MoeyardPlan* a, void* stream) {
  int choices = a->ids.rows * a->ids.cols, blocks = (choices + MOEYARD_PLAN_CHUNK - 1) / MOEYARD_PLAN_CHUNK;
  if (choices == 0) return 0;
  if (choices <= WARP) return launch_early(plan_few, dim3(choices), THREADS, 0, stream, *a, words_of(a->x, a->grouped));
  size_t bytes = size_t(WARPS + 1) * a->slots * sizeof(int);
  if (blocks == 1) {
    bytes += MOEYARD_PLAN_CHUNK * sizeof(int);
    if (cudaError_t error = allow(plan_whole, bytes)) return int(error);
    return launch_early(plan_whole, dim3(choices < 128 ? choices : 128), THREADS, bytes, stream, *a, words_of(a->x, a->grouped));
  }
  if (cudaError_t error = allow(plan_count, bytes)) return int(error);
  if (cudaError_t error = allow(plan_place, bytes)) return int(error);
  if (int error = launch_early(plan_count, dim3(blocks), THREADS, bytes, stream, *a)) return error;
  if (int error = launch_early(plan_scan, dim3(1), THREADS, a->slots * sizeof(int), stream, *a, blocks)) return error;
  if (int error = launch_early(plan_place, dim3(blocks), THREADS, bytes, stream, *a)) return error;
  return launch_early(gather, dim3(choices), THREADS, 0, stream, *a, words_of(a->x, a->grouped));
}
