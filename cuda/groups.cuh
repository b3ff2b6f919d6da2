// Which rows and which weights a tile of a grouped product has, found on the device from the offsets.
#pragma once
#include "common.cuh"

namespace moeyard {

struct Tile {
  int slot;
  int row;   // first row
  int rows;  // rows of the tile that exist
  const void* weight;
};

// Tile number `tile` when every slot's rows are cut into tiles of `size`. Called by the whole block. `turn` is called before the offsets are
// read: where the weights of slots lie is known earlier, and on its way by then.
template <class Turn> __device__ inline Tile find_tile(const MoeyardGemm& a, int tile, int size, Turn turn) {
  if (!a.offsets) {
    turn();
    int row = tile * size;
    return {0, row, min(size, a.x.rows - row), a.weight};
  }
  __shared__ Tile found;
  const void* early = threadIdx.x < min(WARP, a.slots) ? a.weights[threadIdx.x] : nullptr;
  turn();
  if (threadIdx.x < WARP) {
    int before = 0;
    for (int base = 0; base < a.slots; base += WARP) {
      int slot = base + int(threadIdx.x);
      int start = slot < a.slots ? a.offsets[slot] : 0, end = slot < a.slots ? a.offsets[slot + 1] : 0;
      int own = (end - start + size - 1) / size, sum = own;
      for (int o = 1; o < WARP; o <<= 1) {
        int left = __shfl_up_sync(FULL, sum, o);
        if (int(threadIdx.x) >= o) sum += left;
      }
      int first = before + sum - own;
      bool here = tile >= first && tile < first + own;
      if (here) {
        int row = start + (tile - first) * size;
        found = {slot, row, min(size, end - row), base == 0 ? early : a.weights[slot]};
      }
      before += __shfl_sync(FULL, sum, WARP - 1);
      if (__any_sync(FULL, here)) break;
    }
    // A grid sized for the worst case has tiles that nobody fills.
    if (tile >= before && threadIdx.x == 0) found = {0, 0, 0, nullptr};
  }
  __syncthreads();
  return found;
}

__device__ inline const float* bias_of(const MoeyardGemm& a, const Tile& tile) {
  return !a.offsets ? a.bias : a.biases ? a.biases[tile.slot] : nullptr;
}

}  // namespace moeyard
