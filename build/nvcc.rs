//! Part of the build script: compiles every kernel family of cuda/ into a static archive. cutlass-sys links the runtime.

use std::path::Path;
use std::sync::Mutex;
use std::thread;

use super::toolkit::{Toolkit, architectures, hopper_only, type_check_only};

/// One translation unit per kernel family, the slowest to compile first.
const FAMILIES: &[&str] = &[
    "gemm_quantized",
    "gemm_bf16",
    "attention_sm90",
    "attention_mla",
    "attention_decode",
    "attention_bf16",
    "attention",
    "gemm_f32",
    "gemm_narrow",
    "rows",
    "norm",
    "rope",
    "moe",
    "sample",
    "plan",
    "world",
    "device",
];
/// Those that are empty elsewhere.
const HOPPER_ONLY: &[&str] = &["attention_sm90", "attention_mla"];
/// Each nvcc takes about a gigabyte.
const JOBS: usize = 2;

/// Compiles and links everything.
///
/// # Errors
/// A sentence for the person who builds.
pub fn compile_kernels() -> Result<(), String> {
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-changed=build/nvcc.rs");
    println!("cargo::rerun-if-changed=build/toolkit.rs");
    let archs = architectures()?;
    println!("cargo::rustc-env=MOEYARD_CUDA_ARCHS={}", archs.join(","));
    if type_check_only() {
        return Ok(());
    }
    let toolkit = Toolkit::find()?;
    let queue = Mutex::new(FAMILIES.iter());
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..JOBS {
            scope.spawn(|| {
                loop {
                    let Some(family) = queue.lock().unwrap().next() else { return };
                    let archs = if HOPPER_ONLY.contains(family) { hopper_only(&archs) } else { &archs };
                    let file = Path::new("cuda").join(format!("{family}.cu"));
                    if let Err(why) = toolkit.compile(&file, &format!("moeyard_{family}"), archs, &[]) {
                        failures.lock().unwrap().push(why);
                    }
                }
            });
        }
    });
    if let Some(why) = failures.into_inner().unwrap().into_iter().next() {
        return Err(why);
    }
    let out = std::env::var("OUT_DIR").map_err(|e| e.to_string())?;
    println!("cargo::rustc-link-search=native={out}");
    for family in FAMILIES {
        println!("cargo::rustc-link-lib=static=moeyard_{family}");
    }
    Ok(())
}
