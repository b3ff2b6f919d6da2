//! Kernels made of CUTLASS's pieces (`src/*.cu`), for moeyard's CUDA backend. The argument structs are those of cuda/api.h; the caller mirrors
//! them. Needs nvcc and `CUTLASS_HOME` to build, and only with the feature `kernels`.

#[cfg(feature = "kernels")]
mod kernels {
    use std::ffi::{c_int, c_void};

    /// Most groups, slots or batches, of one grouped product.
    pub const MOST_GROUPS: usize = 1024;
    /// Working memory of a product of so many groups.
    pub const fn working_bytes(groups: usize) -> usize {
        128 + groups * 1152
    }

    unsafe extern "C" {
        /// Grouped products of bf16 on compute capability 9.0, asynchronously on `stream` (a cudaStream_t). `args` points to a
        /// MoeyardGroupedGemm on the host, which may end when this returns. Returns 0 or a cudaError_t.
        ///
        /// # Safety
        /// The context of the stream is the calling thread's; what `args` points to is device memory of the sizes that cuda/api.h tells,
        /// and lives until the stream has passed the kernels.
        pub fn moeyard_gemm_grouped(args: *const c_void, stream: *mut c_void) -> c_int;
    }
}
#[cfg(feature = "kernels")]
pub use kernels::*;
