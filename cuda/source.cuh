// How the bf16 products fill a stage of shared memory.
#pragma once
#include "mma.cuh"

namespace moeyard {

constexpr int DEPTH = 64;  // k per stage: a row of 128 bytes

// One thread's share of a stage's copies of ROWS rows: always the same chunk of a row, of rows THREADS / 8 apart. Everything that does
// not depend on the stage is worked out once: with few warps on a multiprocessor the instructions between two copies count.
template <int ROWS, int THREADS> struct Source {
  static constexpr int APART = THREADS / 8, COUNT = (ROWS + APART - 1) / APART;
  static_assert(APART % 8 == 0, "rows of one thread share the permutation of their chunks");
  const bf16* at;
  int64_t apart;  // elements
  int valid;      // copies that lie inside the matrix
  int k_left;     // from this thread's chunk
  uint32_t to;    // relative to the stage

  __device__ Source(const bf16* from, int64_t stride, int rows, int k) {
    int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
    at = from + row * stride + chunk * 8;
    apart = stride * APART;
    valid = row < rows ? (min(rows, ROWS) - row + APART - 1) / APART : 0;
    k_left = k - chunk * 8;
    to = swizzled(0, row, chunk);
    here = row < ROWS;
    first = from;
  }

  // The first STAGES stages, `apart_bytes` apart, through registers: who waits for copies does not wait for these. A barrier shows them
  // to the block.
  template <int STAGES> __device__ void store(uint32_t stage, int apart_bytes) {
    uint4 held[STAGES][COUNT];
#pragma unroll
    for (int s = 0; s < STAGES; ++s)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        bool there = s * DEPTH < k_left && i < valid;
        held[s][i] = there ? *reinterpret_cast<const uint4*>(at + s * DEPTH + i * apart) : uint4{};
      }
#pragma unroll
    for (int s = 0; s < STAGES; ++s)
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        if (ROWS % APART == 0 || here) store_shared(stage + s * apart_bytes + to + i * APART * 128, held[s][i]);
    at += STAGES * DEPTH;
    k_left -= STAGES * DEPTH;
  }

  // The next stage; what lies outside the matrix becomes 0.
  __device__ void copy(uint32_t stage) {
    int count = k_left > 0 ? valid : 0;
    const bf16* from = at;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      // With fewer rows than threads for them, some have nothing to copy.
      if (ROWS % APART == 0 || here) copy_async(stage + to + i * APART * 128, i < count ? from : first, i < count);
      from += apart;
    }
    at += DEPTH;
    k_left -= DEPTH;
  }

 private:
  bool here;
  const bf16* first;
};

}  // namespace moeyard
