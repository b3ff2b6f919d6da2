// Rows that are copied from one matrix to another of the same type and width.
#pragma once
#include "common.cuh"

namespace moeyard {

// to[row] = from[source], by the whole block; in `words` of 16 bytes where both lie well.
__device__ inline void copy_row(const MoeyardMatrix& from, int64_t source, const MoeyardMatrix& to, int64_t row, int words) {
  int bytes = from.type == MOEYARD_BF16 ? 2 : 4;
  const char* data = static_cast<const char*>(from.data) + source * from.stride * bytes;
  char* target = static_cast<char*>(to.data) + row * to.stride * bytes;
  for (int c = threadIdx.x; c < words; c += blockDim.x) reinterpret_cast<uint4*>(target)[c] = reinterpret_cast<const uint4*>(data)[c];
  if (words == 0)
    for (int c = threadIdx.x; c < from.cols; c += blockDim.x) store(to, row, c, load(from, source, c));
}

// Words of a row, or 0 where it cannot be copied in such.
inline int words_of(const MoeyardMatrix& from, const MoeyardMatrix& to) {
  int bytes = from.type == MOEYARD_BF16 ? 2 : 4;
  auto fits = [&](const MoeyardMatrix& m) {
    return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * bytes % 16 == 0;
  };
  return fits(from) && fits(to) && from.cols * bytes % 16 == 0 ? from.cols * bytes / 16 : 0;
}

}  // namespace moeyard
