// bfloat16 on the emulated GPU: every operation is rounded once.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  auto bits = std::bit_cast<uint32_t>(x);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }

namespace emulated {
// A double holds sums and products of bf16 exactly enough: it is rounded to odd before it is rounded to float, and so on down.
inline __nv_bfloat16 rounded(double x) {
  auto single = float(x);
  auto bits = std::bit_cast<uint32_t>(single);
  if (double(single) != x && std::isfinite(single)) {
    // Toward 0, then the last bit set: no tie is made that was none.
    if (std::fabs(double(single)) > std::fabs(x)) --bits;
    bits |= 1;
  }
  return __float2bfloat16_rn(std::bit_cast<float>(bits));
}
template <class F> __nv_bfloat162 of_both(F f) { return {rounded(f(0)), rounded(f(1))}; }
inline double half_of(__nv_bfloat162 pair, int which) { return __bfloat162float(which ? pair.y : pair.x); }
}  // namespace emulated

inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return emulated::of_both([&](int i) { return emulated::half_of(a, i) - emulated::half_of(b, i); });
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return emulated::of_both([&](int i) { return emulated::half_of(a, i) * emulated::half_of(b, i); });
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return emulated::of_both([&](int i) { return std::fma(emulated::half_of(a, i), emulated::half_of(b, i), emulated::half_of(c, i)); });
}
