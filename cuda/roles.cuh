// How warps of a block with different roles meet (PTX ISA: mbarrier, named barriers, setmaxnreg).
#pragma once
#include "common.cuh"

namespace moeyard {

// A barrier in shared memory whose phases complete by `count` arrivals. It takes 8 bytes.
__device__ inline void phase_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(count) : "memory");
}
__device__ inline void phase_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// Waits for the phase of this parity: 0 for the first, the third and so on.
__device__ inline void phase_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra.uni over;\nbra.uni again;\nover:\n}\n" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

// Named barriers: some threads wait, others only say that they have come this far.
template <int THREADS> __device__ inline void named_wait(int barrier) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "n"(THREADS) : "memory");
}
template <int THREADS> __device__ inline void named_arrive(int barrier) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "n"(THREADS) : "memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Registers of a thread, for all warps of a warpgroup.
template <int COUNT> __device__ inline void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT)); }
template <int COUNT> __device__ inline void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT)); }
#endif

}  // namespace moeyard
