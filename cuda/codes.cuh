// Weights in 8 or 4 bits, in tiles of 16 outputs by 128 k, and how a lane's codes become the first operand of `multiply_add`. A tile's
// codes come first, then the scales of its outputs; tiles of the same outputs lie side by side in order of k (the packing is
// src/backend/cuda/packing.rs). Codes lie in the order in which the lanes need them: a lane reads 16 bytes at a time, which are its
// weights of several steps of 16 k, and a warp 512 in a row.
//
// A register of the operand holds k = 2 (lane % 4) and the next: of output lane / 4, of that + 8, then of both again 8 k further.
#pragma once
#include "mma.cuh"

#include <cuda_fp16.h>

namespace moeyard {

constexpr int TILE_OUTPUTS = 16, TILE_DEPTH = 128;
constexpr int TILE_STEPS = TILE_DEPTH / 16;

__device__ inline __nv_bfloat162 as_pair(uint32_t bits) { return reinterpret_cast<const __nv_bfloat162&>(bits); }
__device__ inline uint32_t as_bits(__nv_bfloat162 pair) { return reinterpret_cast<const uint32_t&>(pair); }

// Four float8_e4m3fn in a word, the lowest byte first. NaN is not told from other codes: its block has a scale that is NaN.
__device__ inline float4 widen_e4m3(uint32_t codes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t low, high;
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;\n}\n"
      : "=r"(low), "=r"(high)
      : "r"(codes));
  float2 u = __half22float2(reinterpret_cast<const __half2&>(low)), v = __half22float2(reinterpret_cast<const __half2&>(high));
  return {u.x, u.y, v.x, v.y};
#else
  // Exponent and mantissa where those of a bf16 are: 2^-120 times the number, subnormal ones included.
  auto placed = [](uint32_t word) { return word & 0x80008000u | word >> 4 & 0x07f007f0u; };
  const __nv_bfloat162 factor = as_pair(0x7b807b80u);  // 2^120
  uint32_t even = as_bits(__hmul2(as_pair(placed(codes << 8)), factor)), odd = as_bits(__hmul2(as_pair(placed(codes)), factor));
  return {__uint_as_float(even << 16), __uint_as_float(odd << 16), __uint_as_float(even & 0xffff0000u),
          __uint_as_float(odd & 0xffff0000u)};
#endif
}

// float8_e4m3fn with a scale in f32 for each block of 128 by 128: weight = bf16(f32(code * scale)).
struct Fp8 {
  static constexpr int STEPS = 2;  // of 16 k in 16 bytes of a lane
  static constexpr int CODE_BYTES = 2048, BYTES = CODE_BYTES + 16;
  static constexpr int STAGES = 6;  // where what is under way counts

  // Of outputs 0..8 and 8..16 of the tile: gates and ups have scales of their own.
  float scale[2];

  __device__ void load(uint32_t tile, int) {
    for (int half = 0; half < 2; ++half) scale[half] = __uint_as_float(load_shared(tile + CODE_BYTES + half * 4));
  }

  __device__ void weights(uint32_t (&a)[4], const uint32_t (&codes)[4], int step) const {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float4 w = widen_e4m3(codes[step * 2 + part]);
      a[part * 2] = as_bits(__floats2bfloat162_rn(w.x * scale[0], w.y * scale[0]));
      a[part * 2 + 1] = as_bits(__floats2bfloat162_rn(w.z * scale[1], w.w * scale[1]));
    }
  }
};

// Four bits with a scale of 11 significant bits and a zero from 0 to 16 for each output and 128 k: weight = bf16((code - zero) * scale).
// The scale is the sum of two bf16, of which the second has 3 significant bits: times a difference of 5 it is exact, and the sum is
// rounded once.
struct Int4 {
  static constexpr int STEPS = 4;
  static constexpr int CODE_BYTES = 1024, BYTES = CODE_BYTES + 64;
  static constexpr int STAGES = 8;

  // Twice each, of outputs lane / 4 and that + 8.
  __nv_bfloat162 zero[2], high[2], low[2];

  __device__ void load(uint32_t tile, int lane) {
    for (int half = 0; half < 2; ++half) {
      // A float whose lowest five bits are the zero instead.
      uint32_t word = load_shared(tile + CODE_BYTES + (half * 8 + lane / 4) * 4);
      uint32_t top = word & 0xffff0000u;
      uint32_t rest = __float_as_uint(__uint_as_float(word & ~31u) - __uint_as_float(top));
      zero[half] = as_pair((word & 31u) * 0x00010001u + 0x43004300u);  // 128 + zero
      high[half] = as_pair(top | top >> 16);
      low[half] = as_pair(rest | rest >> 16);
    }
  }

  // Register r has the nibbles r and r + 4 of a word.
  __device__ void weights(uint32_t (&a)[4], const uint32_t (&codes)[4], int step) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      uint32_t code = and_or(codes[step] >> 4 * r, 0x000f000fu, 0x43004300u);  // 128 + code
      __nv_bfloat162 difference = __hsub2(as_pair(code), zero[r % 2]);
      a[r] = as_bits(__hfma2(difference, high[r % 2], __hmul2(difference, low[r % 2])));
    }
  }
};

}  // namespace moeyard
