// Which rows of a world a rank computes, and where everything goes: worked out by each rank for itself from the choices of all. A
// stable counting sort by expert, whose rows are then cut into runs, one for each replica.
#include "copy_row.cuh"

using namespace moeyard;

namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;

// A place among the rows of an expert's replicas.
struct Place {
  int replica;
  int at;  // among the rows of that replica
};

// Of row number i of `total`, which `replicas` share evenly: the first of them take one more where it does not divide.
__device__ Place place_of(int total, int replicas, int i) {
  int few = total / replicas, more = total % replicas, longer = more * (few + 1);
  if (i < longer) return {i / (few + 1), i % (few + 1)};
  return {more + (i - longer) / few, (i - longer) % few};
}

// Row of the world, counted over all ranks' padded rows, and its expert, or -1: in padding, and in rows that did not arrive whole.
struct Choice {
  int row, j, expert;
};

__device__ Choice choice_of(const MoeyardWorld& a, int choice) {
  int row = choice / a.ids.cols, j = choice % a.ids.cols;
  if (uint32_t(row % a.rows) >= a.counts[row / a.rows]) return {row, j, -1};
  int expert = static_cast<const int32_t*>(a.ids.data)[row * a.ids.stride + j];
  return {row, j, unsigned(expert) < unsigned(a.experts) ? expert : -1};
}

// counts[w * experts + e] becomes the number of choices that earlier warps have of expert e; totals[e], that of all.
__device__ void count(const MoeyardWorld& a, int choices, int each, int* counts, int* totals) {
  for (int i = threadIdx.x; i < WARPS * a.experts; i += THREADS) counts[i] = 0;
  __syncthreads();
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  for (int i = 0; i < each; ++i) {
    int choice = (warp * each + i) * WARP + lane;
    int expert = choice < choices ? choice_of(a, choice).expert : -1;
    if (expert >= 0) atomicAdd(&counts[warp * a.experts + expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < a.experts; e += THREADS) {
    int sum = 0;
    for (int w = 0; w < WARPS; ++w) {
      int own = counts[w * a.experts + e];
      counts[w * a.experts + e] = sum;
      sum += own;
    }
    totals[e] = sum;
  }
  __syncthreads();
}

// base[s] becomes the first row of this rank's slot s, base[slots] the end.
__device__ void find_offsets(const MoeyardWorld& a, const int* totals, int* base) {
  for (int s = threadIdx.x; s < a.slots; s += THREADS) base[s] = 0;
  __syncthreads();
  for (int e = threadIdx.x; e < a.experts; e += THREADS) {
    int first = int(a.starts[e]), replicas = int(a.starts[e + 1]) - first;
    for (int r = 0; r < replicas; ++r) {
      int slot = int(a.replicas[first + r]) - a.rank / a.expert_tp * a.slots;
      if (slot >= 0 && slot < a.slots) base[slot] = totals[e] / replicas + (r < totals[e] % replicas);
    }
  }
  __syncthreads();
  if (threadIdx.x < WARP) {
    int before = 0;
    for (int first = 0; first < a.slots; first += WARP) {
      int slot = first + int(threadIdx.x), own = slot < a.slots ? base[slot] : 0, sum = own;
      for (int o = 1; o < WARP; o <<= 1) {
        int left = __shfl_up_sync(FULL, sum, o);
        if (int(threadIdx.x) >= o) sum += left;
      }
      if (slot < a.slots) base[slot] = before + sum - own;
      before += __shfl_sync(FULL, sum, WARP - 1);
    }
    if (threadIdx.x == 0) base[a.slots] = before;
  }
  __syncthreads();
}

// Gives every choice of an expert of this rank its row, in `grouped` [choices], and all others -1. The block that `writes` also notes
// where results go, and where those of this rank's own rows come from.
__device__ void place(const MoeyardWorld& a, int choices, int each, int* counts, const int* totals, const int* base, bool writes,
                      int* grouped) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int *own = counts + warp * a.experts, k = a.ids.cols, per_token = k < a.slots ? k : a.slots, returned = a.rows * per_token;
  for (int i = 0; i < each; ++i) {
    int choice = (warp * each + i) * WARP + lane;
    Choice c = choice < choices ? choice_of(a, choice) : Choice{0, 0, -1};
    unsigned peers = __match_any_sync(FULL, c.expert);
    int earlier = __popc(peers & ((1u << lane) - 1)), row = -1;
    if (c.expert >= 0) {
      int first = int(a.starts[c.expert]), replicas = int(a.starts[c.expert + 1]) - first;
      Place at = place_of(totals[c.expert], replicas, own[c.expert] + earlier);
      int slot = int(a.replicas[first + at.replica]), rank = slot / a.slots, local = slot % a.slots;
      int source = c.row / a.rows, token = c.row % a.rows;
      // Two choices of a token are of different experts, in different slots.
      int back = token * per_token + (k <= a.slots ? c.j : local);
      if (rank == a.rank / a.expert_tp) {
        row = base[local] + at.at;
        if (writes) a.homes[row] = uint32_t(source * returned + back);
      }
      if (writes && source == a.rank)
        for (int x = 0; x < a.expert_tp; ++x)
          a.index[(token * k + c.j) * a.expert_tp + x] = (rank * a.expert_tp + x) * returned + back;
    }
    if (choice < choices) grouped[choice] = row;
    __syncwarp();
    if (c.expert >= 0 && earlier == 0) own[c.expert] += __popc(peers);
    __syncwarp();
  }
  __syncthreads();
}

// Every block works all of it out for itself, the first writes it down, and each copies some rows.
__global__ void __launch_bounds__(THREADS) world(MoeyardWorld a, int words) {
  extern __shared__ int shared[];
  int choices = a.ids.rows * a.ids.cols, each = (choices + THREADS - 1) / THREADS;
  int *counts = shared, *totals = counts + WARPS * a.experts, *base = totals + a.experts, *grouped = base + a.slots + 1;
  to_cache(a.starts, a.experts + 1);
  start_in_turn();
  count(a, choices, each, counts, totals);
  find_offsets(a, totals, base);
  if (blockIdx.x == 0)
    for (int s = threadIdx.x; s <= a.slots; s += THREADS) a.offsets[s] = base[s];
  place(a, choices, each, counts, totals, base, blockIdx.x == 0, grouped);
  for (int choice = blockIdx.x; choice < choices; choice += gridDim.x)
    if (grouped[choice] >= 0) copy_row(a.x, choice / a.ids.cols, a.grouped, grouped[choice], words);
}

__global__ void __launch_bounds__(THREADS) bring_home(MoeyardReturn a, int words) {
  start_in_turn();
  if (int(blockIdx.x) < a.offsets[a.slots]) copy_row(a.computed, blockIdx.x, a.returned, a.homes[blockIdx.x], words);
}

}  // namespace

extern "C" int moeyard_world(const MoeyardWorld* a, void* stream) {
  int choices = a->ids.rows * a->ids.cols;
  size_t bytes = (size_t(WARPS + 1) * a->experts + a->slots + 1 + choices) * sizeof(int);
  if (cudaError_t error = allow(world, bytes)) return int(error);
  return launch_early(world, dim3(choices < 128 ? choices : 128), THREADS, bytes, stream, *a, words_of(a->x, a->grouped));
}

extern "C" int moeyard_return(const MoeyardReturn* a, void* stream) {
  if (a->computed.rows == 0) return 0;
  return launch_early(bring_home, dim3(a->computed.rows), THREADS, 0, stream, *a, words_of(a->computed, a->returned));
}
