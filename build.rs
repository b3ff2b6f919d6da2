//! Tells the commit that is built, and compiles cuda/ with nvcc when the feature `cuda` is on; the default build compiles
//! no C or CUDA.

#[path = "build/commit.rs"]
mod commit;
#[cfg(feature = "cuda")]
#[path = "build/nvcc.rs"]
mod nvcc;
#[cfg(feature = "cuda")]
#[path = "build/toolkit.rs"]
mod toolkit;

use std::env;
use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    tell_commit();
    #[cfg(feature = "cuda")]
    if let Err(why) = nvcc::compile_kernels() {
        // One sentence, not a backtrace.
        println!("cargo::error={why}");
    }
}

/// Sets MOEYARD_COMMIT for the crate, unless whoever packages it did. In optimised builds only: others are for work on the
/// code, where every commit would compile everything anew.
fn tell_commit() {
    println!("cargo::rerun-if-changed=build/commit.rs");
    println!("cargo::rerun-if-env-changed=MOEYARD_COMMIT");
    if env::var_os("MOEYARD_COMMIT").is_some() || env::var("PROFILE").is_ok_and(|profile| profile == "debug")
    {
        return;
    }
    let root = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it");
    if let Some((commit, files)) = commit::find(Path::new(&root)) {
        println!("cargo::rustc-env=MOEYARD_COMMIT={commit}");
        files.iter().for_each(|file| println!("cargo::rerun-if-changed={}", file.display()));
    }
}
