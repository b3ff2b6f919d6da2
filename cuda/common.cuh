// What all kernels share: typed access to matrices, sums over a warp and a block.
#pragma once
#include "api.h"
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace moeyard {

using bf16 = __nv_bfloat16;
constexpr int WARP = 32;
constexpr unsigned FULL = 0xffffffffu;
// Of the GPUs on which grids and tiles were measured, H100 and H200.
constexpr int MULTIPROCESSORS = 132;

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
inline int launched() { return int(cudaGetLastError()); }

// From compute capability 9.0 on a kernel given to a stream by `launch_early` may start while the one before it still runs, once all
// blocks of that one have said so or are done. `wait_for_turn` returns when all of the kernel before is done and seen: it comes before what
// reads or writes memory that others write, and at least one thread of every kernel calls it, so that a kernel never ends before the one
// before it. Kernels that are launched otherwise may call both.
__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ inline void wait_for_turn() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
// The next kernel is let in first: its blocks find their places, and fetch what they may, while this one waits.
__device__ inline void start_in_turn() {
  let_next_start();
  wait_for_turn();
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

// Bytes of shared memory that a block can have on the current device: 163 KB on compute capability 8.0, 227 on 9.0.
inline int most_shared() {
  int device = 0, most = 0;
  return !cudaGetDevice(&device) && !cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ? most : 0;
}

// Lets a kernel's launches have so much shared memory, and every amount that the GPU gives: the bound belongs to the kernel, and another
// rank's thread may be about to launch it with more.
template <class Kernel> cudaError_t allow(Kernel kernel, size_t bytes) {
  if (bytes <= 32 * 1024) return cudaSuccess;  // with what a kernel has of its own, less than every kernel may have anyway
  cudaFuncAttributes own{};
  if (cudaError_t error = cudaFuncGetAttributes(&own, kernel)) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared() - int(own.sharedSizeBytes));
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

// Elements `first + i * step`, as far as they are below `end`. All loads are under way at once: a branch on the type around each one would make
// it wait for the one before.
template <int N, class T> __device__ inline void load_all(float (&x)[N], const T* from, int first, int step, int end) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = first + i * step < end ? widen(from[first + i * step]) : 0.0f;
}
template <int N> __device__ inline void load_all(float (&x)[N], const MoeyardMatrix& m, int64_t row, int first, int step, int end) {
  if (m.type == MOEYARD_BF16) load_all(x, static_cast<const bf16*>(m.data) + row * m.stride, first, step, end);
  else load_all(x, static_cast<const float*>(m.data) + row * m.stride, first, step, end);
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
