// What all kernels share: typed access to matrices, sums over a warp and a block.
#pragma once
#include "api.h"
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace moeyard {

using bf16 = __nv_bfloat16;
constexpr int WARP = 32;
constexpr unsigned FULL = 0xffffffffu;

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
inline int launched() { return int(cudaGetLastError()); }

// From compute capability 9.0 on a kernel given to a stream by `launch_early` may start while the one before it still runs. Such a kernel
// calls this before it reads or writes memory that others write: it returns when all of the kernel before is done and seen. Then
// the next one may start. A kernel that is launched otherwise may call it too.
__device__ inline void start_in_turn() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Brings `count` elements into the second-level cache, by the whole block. That cache shows what other kernels write, so this may come
// before `start_in_turn`; with a step's weights passing through it, little of the last layer is left there.
template <class T> __device__ inline void to_cache(const T* from, int count) {
  constexpr int LINE = 128 / sizeof(T);
  for (int i = threadIdx.x * LINE; i < count; i += blockDim.x * LINE) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
}

// Whether the current device starts kernels early.
inline bool starts_early() {
  int device = 0, major = 0;
  return !cudaGetDevice(&device) && !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) && major >= 9;
}

template <class... Parameters, class... Arguments>
int launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream_of(stream);
  config.attrs = &early;
  config.numAttrs = starts_early() ? 1 : 0;
  return int(cudaLaunchKernelEx(&config, kernel, arguments...));
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }
template <class T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }

// The type is the same for all threads, so the branch costs nothing beside the memory access.
__device__ inline float load(const MoeyardMatrix& m, int64_t row, int64_t col) {
  int64_t at = row * m.stride + col;
  return m.type == MOEYARD_BF16 ? widen(static_cast<const bf16*>(m.data)[at]) : static_cast<const float*>(m.data)[at];
}
__device__ inline void store(const MoeyardMatrix& m, int64_t row, int64_t col, float x) {
  int64_t at = row * m.stride + col;
  if (m.type == MOEYARD_BF16) static_cast<bf16*>(m.data)[at] = narrow<bf16>(x);
  else static_cast<float*>(m.data)[at] = x;
}

// Not __expf, and no fast division: the CPU's answer is the semantics.
__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ inline float activate(float gate, float up, int activation, float limit, float alpha) {
  if (activation == MOEYARD_SILU_MUL) return gate * sigmoid(gate) * up;
  gate = fminf(gate, limit);
  up = fminf(fmaxf(up, -limit), limit);
  return gate * sigmoid(alpha * gate) * (up + 1.0f);
}

__device__ inline float warp_sum(float x) {
  for (int o = WARP / 2; o; o >>= 1) x += __shfl_xor_sync(FULL, x, o);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int o = WARP / 2; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, o));
  return x;
}

// The sum over a block of whole warps, for every thread. The order depends on the block's size alone.
__device__ inline float block_sum(float x) {
  __shared__ float sums[WARP];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  x = warp_sum(x);
  if (warps == 1) return x;
  __syncthreads();
  if (lane == 0) sums[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? sums[lane] : 0.0f);
}

}  // namespace moeyard
