// In place of CuTe's: what a product of a warpgroup takes of tensors and atoms. Operands are K-major bf16 in shared memory in the 128-byte
// swizzle; of one product after another along k, the descriptor is 32 bytes further.
#pragma once
#include <cuda_bf16.h>

#include "shared.h"
#include "wgmma.h"

namespace cute {

using bfloat16_t = __nv_bfloat16;
template <int N> struct Int {};
using _64 = Int<64>;
template <class... Extents> struct Shape {};
constexpr struct Underscore {
} _;

template <class Kind> struct Tensor : Kind {};

// Rows of 64 elements in atoms of eight; a pointer to them.
template <int ROWS> struct SwizzledLayout {};
template <class T> struct SharedPointer {
  T* to;
};
template <class T> SharedPointer<T> make_smem_ptr(T* to) { return {to}; }
inline uint32_t cast_smem_ptr_to_uint(const void* p) { return uint32_t(emulated::shared_address(p)); }
struct SharedMatrix {
  uint32_t address;
};
template <int ROWS> Tensor<SharedMatrix> make_tensor(SharedPointer<bfloat16_t> from, SwizzledLayout<ROWS>) {
  return {uint32_t(emulated::shared_address(from.to))};
}

// Descriptors of its parts along k.
struct Descriptors {
  static constexpr int STEPS = 4;
  uint64_t first;
  uint64_t operator()(Underscore, Underscore, int k) const { return first + k * (32 >> 4); }
};
template <int MODE> constexpr int size(const Tensor<Descriptors>&) {
  static_assert(MODE == 2);
  return Descriptors::STEPS;
}
inline Tensor<Descriptors> descriptors(SharedMatrix matrix) {
  constexpr uint64_t LEADING = 1, STRIDE = 1024 >> 4, SWIZZLE_128B = 1;
  if (matrix.address % 1024) emulated::fail("atoms of 1024 bytes at %u", matrix.address);
  return {matrix.address >> 4 | LEADING << 16 | STRIDE << 32 | SWIZZLE_128B << 62};
}

// Sums of 64 outputs of N rows that a thread holds.
template <int N> struct Fragment {
  float values[N / 2];
  float operator()(int i) const { return values[i]; }
};
template <int N> void warpgroup_fence_operand(Tensor<Fragment<N>>&) {}

namespace GMMA {
enum class Major { K, MN };
enum class ScaleOut { Zero, One };
template <class T> struct Layout_K_SW128_Atom {};
template <int N> struct Atom {};
template <class A, class B, class C, class Tile, Major MAJOR_A, Major MAJOR_B> constexpr auto ss_op_selector() {
  static_assert(std::is_same_v<A, bfloat16_t> && std::is_same_v<B, bfloat16_t> && std::is_same_v<C, float>);
  static_assert(MAJOR_A == Major::K && MAJOR_B == Major::K);
  return []<int N, int K>(Shape<_64, Int<N>, Int<K>>) { return Atom<N>{}; }(Tile{});
}
}  // namespace GMMA
template <int ROWS> SwizzledLayout<ROWS> tile_to_shape(GMMA::Layout_K_SW128_Atom<bfloat16_t>, Shape<Int<ROWS>, _64>) { return {}; }

template <int N> struct TiledMma {
  GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
  struct Slice {
    SharedMatrix partition_A(SharedMatrix weights) const { return weights; }
    SharedMatrix partition_B(SharedMatrix rows) const { return rows; }
    Tensor<Descriptors> make_fragment_A(SharedMatrix weights) const { return descriptors(weights); }
    Tensor<Descriptors> make_fragment_B(SharedMatrix rows) const { return descriptors(rows); }
  };
  Slice get_thread_slice(int) const { return {}; }
};
template <int N> TiledMma<N> make_tiled_mma(GMMA::Atom<N>) { return {}; }
template <int N> Tensor<Fragment<N>> partition_fragment_C(TiledMma<N>, Shape<_64, Int<N>>) {
  Tensor<Fragment<N>> sums;
  std::fill(std::begin(sums.values), std::end(sums.values), NAN);
  return sums;
}

inline void warpgroup_arrive() { emulated::order_registers(); }
inline void warpgroup_commit_batch() { emulated::commit_products(); }
template <int N> void warpgroup_wait() { emulated::wait_for_products(N); }
template <int N> void gemm(const TiledMma<N>& mma, uint64_t a, uint64_t b, Tensor<Fragment<N>>& sums) {
  emulated::Product product{N, mma.accumulate_ == GMMA::ScaleOut::One, false, false, false, {}, a, b, {}};
  for (int i = 0; i < N / 2; ++i) product.d[i] = &sums.values[i];
  emulated::start_product(product);
}

}  // namespace cute
