// How the bf16 products end: bias, gated activation, store. A lane holds two outputs, n and n + 8, of each of its rows.
#pragma once
#include "groups.cuh"

namespace moeyard {

struct Outputs {
  int n;         // the first; the second is 8 further
  int gated;     // column of both together where they are a gate and its up
  float low, high;  // biases
};

// Of the 16 outputs that start at `first`.
__device__ inline Outputs outputs_of(const MoeyardGemm& a, const Tile& tile, int first, int lane) {
  const float* bias = bias_of(a, tile);
  int n = first + lane / 4;
  return {n, first / 2 + lane / 4, bias && n < a.n ? bias[n] : 0.0f, bias && n + 8 < a.n ? bias[n + 8] : 0.0f};
}

// Row `row` of the tile.
__device__ inline void finish(const MoeyardGemm& a, const Tile& tile, const Outputs& o, int64_t shift, int row, float u,
                              float v) {
  if (row >= tile.rows || o.n >= a.n) return;
  u += o.low;
  v += o.high;
  if (a.activation) {
    store(a.out, tile.row + row, shift + o.gated, activate(u, v, a.activation, a.limit, a.alpha));
    return;
  }
  store(a.out, tile.row + row, shift + o.n, u);
  if (o.n + 8 < a.n) store(a.out, tile.row + row, shift + o.n + 8, v);
}

}  // namespace moeyard
