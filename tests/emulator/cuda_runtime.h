// What kernels and launchers need of CUDA's language and runtime, on the emulated GPU.
#pragma once
#include <algorithm>
#include <bit>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "accesses.h"
#include "grid.h"

#define __device__
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(bytes)
#define __forceinline__ inline

using std::isfinite, std::max, std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline void __syncthreads() { emulated::wait_for_block(); }
inline void __syncwarp(unsigned = ~0u) { emulated::meet_warp(); }

template <class T> T __shfl_sync(unsigned, T x, int lane) { return emulated::from_all(x)[lane % emulated::WARP]; }
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) { return emulated::from_all(x)[emulated::thread % emulated::WARP ^ mask]; }
template <class T> T __shfl_up_sync(unsigned, T x, int delta) {
  int lane = emulated::thread % emulated::WARP;
  return emulated::from_all(x)[lane >= delta ? lane - delta : lane];
}
inline bool __any_sync(unsigned, bool x) {
  for (bool other : emulated::from_all(char(x)))
    if (other) return true;
  return false;
}
inline unsigned __match_any_sync(unsigned, int x) {
  unsigned mask = 0, bit = 1;
  for (int other : emulated::from_all(x)) mask |= other == x ? bit : 0, bit <<= 1;
  return mask;
}
inline unsigned __reduce_add_sync(unsigned, unsigned x) {
  auto all = emulated::from_all(x);
  return std::accumulate(all.begin(), all.end(), 0u);
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) { return std::ranges::max(emulated::from_all(x)); }
inline unsigned __reduce_min_sync(unsigned, unsigned x) { return std::ranges::min(emulated::from_all(x)); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ull2double_rn(unsigned long long x) { return double(x); }
inline unsigned long long __double2ull_ru(double x) { return static_cast<unsigned long long>(ceil(x)); }
inline unsigned long long __float2ull_rn(float x) { return static_cast<unsigned long long>(rintf(x)); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}
// One thread runs at a time.
template <class T> T atomicAdd(T* to, T x) {
  emulated::accesses::Atomic atomic;
  T before = *to;
  *to += x;
  return before;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801;
enum { cudaLaunchAttributeProgrammaticStreamSerialization };
enum { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
  int cluster = 1;  // what __cluster_dims__ says of the kernel
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
int cudaGetDeviceCount(int* count);
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, int which, int) {
  // A GPU on which kernels overlap has compute capability 9.0 as far as launches are concerned.
  constexpr int MULTIPROCESSORS = 6;
  if (which == cudaDevAttrMultiProcessorCount) *value = MULTIPROCESSORS;
  else *value = which == cudaDevAttrComputeCapabilityMajor ? emulated::overlapping() ? 9 : emulated::capability : int(emulated::most_shared());
  return cudaSuccess;
}
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, int flags, cudaDriverEntryPointQueryResult* found);
inline int cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(int error) { return error ? "cudaErrorInvalidValue" : "cudaSuccess"; }
template <class Kernel> int cudaFuncSetAttribute(Kernel, int, int) { return cudaSuccess; }
template <class Kernel> int cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  *attributes = {};
  return cudaSuccess;
}

inline void cudaTriggerProgrammaticLaunchCompletion() { emulated::let_next_start(); }
inline void cudaGridDependencySynchronize() { emulated::wait_for_turn(); }

template <class... Parameters, class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  bool early = false;
  for (int i = 0; i < config->numAttrs; ++i) early |= config->attrs[i].val.programmaticStreamSerializationAllowed != 0;
  auto [x, y, z] = config->gridDim;
  auto body = [=] { kernel(Parameters(arguments)...); };
  emulated::enqueue(config->stream, {reinterpret_cast<const void*>(kernel), {x, y, z}, int(config->blockDim.x), config->dynamicSmemBytes,
                                     config->cluster, early, body});
  return cudaSuccess;
}
// kernel<<<grid, threads, bytes, stream>>>(arguments...)
template <class... Parameters, class... Arguments>
void emulated_launch(dim3 grid, int threads, size_t bytes, cudaStream_t stream, void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchConfig_t config{grid, dim3(threads), bytes, stream, nullptr, 0};
  cudaLaunchKernelEx(&config, kernel, arguments...);
}
