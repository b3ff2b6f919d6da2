// The instructions of a warp: copies to shared memory, matrices of 8 by 8 in registers, and the tensor cores of compute capability 8.0
// (PTX ISA: cp.async, ldmatrix, movmatrix, mma).
#pragma once
#include <cuda_runtime.h>

#include "shared.h"

namespace emulated {

inline void copy_async(uint32_t to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || (bytes != 0 && bytes != 16)) fail("a copy of %d bytes from %p", bytes, from);
  auto copy = [=, asked = accesses::now()] {
    accesses::Since since(asked);
    store_shared(to, bytes ? *static_cast<const uint4*>(from) : uint4{});
  };
  // At any time until it is waited for.
  if (bytes) accesses::read(from, bytes);
  if (drawn(2)) copy();
  else copies().open.push_back(copy);
}
inline void commit_copies() {
  copies().groups.push_back(std::move(copies().open));
  copies().open.clear();
}

// Lane l names row l % 8 of matrix l / 8, and gets of each matrix row l / 4, columns l % 4 * 2 and the next; transposed: the other way round.
template <bool TRANSPOSED, class... Words> void load_matrices(uint32_t from, Words&... to) {
  auto rows = from_all(from);
  int lane = thread % WARP, m = 0;
  auto load = [&](uint32_t& word) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      int outer = lane / 4, inner = lane % 4 * 2 + e;
      pair[e] = shared_at<uint16_t>(rows[m * 8 + (TRANSPOSED ? inner : outer)] + (TRANSPOSED ? outer : inner) * 2);
    }
    word = pair[0] | uint32_t(pair[1]) << 16;
    ++m;
  };
  (load(to), ...);
  wait_for_warp();
}

// Lane l has row l / 4, columns l % 4 * 2 and the next, and gets these of the transposed matrix.
inline uint32_t transposed(uint32_t word) {
  auto all = from_all(word);
  int lane = thread % WARP, row = lane / 4, column = lane % 4 * 2;
  auto element = [&](int row, int column) { return all[row * 4 + column / 2] >> column % 2 * 16 & 0xffff; };
  return element(column, row) | element(column + 1, row) << 16;
}

// One of the two bf16 in a word.
inline double half_of_word(uint32_t word, int which) { return double(__uint_as_float(which ? word & 0xffff0000u : word << 16)); }
// The first operand of a product, 16 rows by 16 k, lies in four words of each lane: which lane, which word, which half.
inline int lane_of(int row, int k) { return row % 8 * 4 + k % 8 / 2; }
inline int word_of(int row, int k) { return k / 8 * 2 + row / 8; }

// d[16, 8] += a[16, 16] b[16, 8], each element's sum rounded once.
inline void multiply_add(float* const (&d)[4], const uint32_t (&words)[6]) {
  int lane = thread % WARP;
  const Shown* of = lanes();
  std::copy_n(words, 6, lanes()[lane].words);
  wait_for_warp();
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = *d[i];
    for (int k = 0; k < 16; ++k)
      sum += half_of_word(of[lane_of(row, k)].words[word_of(row, k)], k % 2) *
             half_of_word(of[column * 4 + k % 8 / 2].words[4 + k / 8], k % 2);
    *d[i] = float(sum);
  }
  wait_for_warp();
}

}  // namespace emulated
