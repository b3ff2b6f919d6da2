// In place of cuda/mma.cuh: the tensor-core instructions by their definition (PTX ISA: cp.async, ldmatrix, mma).
#pragma once
#include "common.cuh"

namespace moeyard {

inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const char*>(p) - emulated::block->shared); }
template <class T> T& shared_at(uint32_t address) {
  if (address % alignof(T)) emulated::fail("an access to %zu bytes of shared memory at %u", sizeof(T), address);
  return *reinterpret_cast<T*>(emulated::block->shared + address);
}

inline void copy_async(uint32_t to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulated::fail("a copy from %p", from);
  emulated::copies().open.push_back([=] { shared_at<uint4>(to) = valid ? *static_cast<const uint4*>(from) : uint4{}; });
}
inline void copy_commit() {
  auto& copies = emulated::copies();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}
template <int N> void copy_wait() { emulated::copies().wait(N); }

// Lane l names row l % 8 of matrix l / 8, and gets of each matrix row l / 4, columns l % 4 * 2 and the next; transposed: the other way round.
template <bool TRANSPOSED> void load_matrices(uint32_t* to, int count, uint32_t from) {
  auto rows = emulated::from_all(from);
  int lane = emulated::thread % WARP;
  for (int m = 0; m < count; ++m) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      int outer = lane / 4, inner = lane % 4 * 2 + e;
      pair[e] = shared_at<uint16_t>(rows[m * 8 + (TRANSPOSED ? inner : outer)] + (TRANSPOSED ? outer : inner) * 2);
    }
    to[m] = pair[0] | uint32_t(pair[1]) << 16;
  }
  emulated::wait_for_warp();
}
inline void load_matrix_x4(uint32_t (&r)[4], uint32_t from) { load_matrices<false>(r, 4, from); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t from) { load_matrices<true>(r, 4, from); }
inline void load_matrix_x2(uint32_t (&r)[2], uint32_t from) { load_matrices<false>(r, 2, from); }

inline uint32_t load_shared(uint32_t from) { return shared_at<uint32_t>(from); }
inline void load_shared_x4(uint32_t (&r)[4], uint32_t from) {
  uint4 x = shared_at<uint4>(from);
  r[0] = x.x, r[1] = x.y, r[2] = x.z, r[3] = x.w;
}
inline void store_shared(uint32_t to, uint4 x) { shared_at<uint4>(to) = x; }
inline void store_shared(uint32_t to, uint32_t x) { shared_at<uint32_t>(to) = x; }

inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }

// d[16, 8] += a[16, 16] b[16, 8], each element's sum rounded once.
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  int lane = emulated::thread % WARP;
  const emulated::Shown* shown = emulated::lanes();
  uint32_t(&own)[7] = emulated::lanes()[lane].words;
  for (int i = 0; i < 4; ++i) own[i] = a[i];
  own[4] = b0, own[5] = b1;
  emulated::wait_for_warp();
  auto element = [shown](int lane, int word, int k) {
    uint32_t pair = shown[lane].words[word];
    return double(__uint_as_float(k % 2 ? pair & 0xffff0000u : pair << 16));
  };
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k)
      sum += element(row % 8 * 4 + k % 8 / 2, k / 8 * 2 + row / 8, k) * element(column * 4 + k % 8 / 2, 4 + k / 8, k);
    d[i] = float(sum);
  }
  emulated::wait_for_warp();
}

inline uint32_t swizzled(uint32_t base, int row, int chunk) { return base + uint32_t(row) * 128 + uint32_t((chunk ^ (row & 7)) * 16); }

}  // namespace moeyard
