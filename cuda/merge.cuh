// Joins the chunks of rows whose chunks had blocks of their own. A chunk's partial result is D values, the maximum, the sum.
#pragma once
#include "softmax.cuh"

namespace moeyard {

__device__ inline int first_seen(const MoeyardAttention& a, const MoeyardSpan& span) {
  return a.window ? max(0, int(span.position) - a.window + 1) : 0;
}

// Where chunk `chunk`, counted from the first one that the span's row sees, leaves its part.
template <int D>
__device__ inline float* partial(const MoeyardAttention& a, int span, int head, int chunk) {
  return a.partials + ((int64_t(span) * a.heads + head) * a.chunks + chunk) * (D + 2);
}

// One row and head; a thread per column. Chunks are read several at a time and joined one after the other.
template <int D> __global__ void __launch_bounds__(D) merge(MoeyardAttention a) {
  constexpr int AT_ONCE = 8;
  const MoeyardSpan span = a.spans[blockIdx.x];
  int head = blockIdx.y, chunks = int(span.position) / CHUNK - first_seen(a, span) / CHUNK + 1;
  const float* from = partial<D>(a, blockIdx.x, head, 0);
  State total = nothing();
  float value = 0.0f;
  start_in_turn();
  for (int first = 0; first < chunks; first += AT_ONCE) {
    float late[AT_ONCE];
    State state[AT_ONCE];
#pragma unroll
    for (int c = 0; c < AT_ONCE; ++c)
      if (first + c < chunks) {
        const float* part = from + int64_t(first + c) * (D + 2);
        late[c] = part[threadIdx.x];
        state[c] = {part[D], part[D + 1]};
      }
#pragma unroll
    for (int c = 0; c < AT_ONCE; ++c)
      if (first + c < chunks) {
        Factors f = join(total, state[c]);
        value = joined(value, late[c], f);
      }
  }
  store(a.out, span.row, int64_t(head) * D + threadIdx.x, value * last_factor(total, a.sinks, head));
}

template <int D> int merge_chunks(const MoeyardAttention& a, void* stream) {
  return launch_early(merge<D>, dim3(a.span_count, a.heads), D, 0, stream, a);
}

}  // namespace moeyard
