//! Compiles cuda/ with nvcc when the feature `cuda` is on; the default build compiles no C or CUDA.

#[cfg(feature = "cuda")]
#[path = "build/nvcc.rs"]
mod nvcc;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    if let Err(why) = nvcc::compile_kernels() {
        // One sentence, not a backtrace.
        println!("cargo::error={why}");
    }
}
