//! Part of the build script: finds the CUDA toolkit, compiles every kernel family into a static archive, and links the
//! runtime statically, so that the binary starts on machines without CUDA.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

/// One translation unit per kernel family, the slowest to compile first.
const FAMILIES: &[&str] = &[
    "gemm_sm90",
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
    "moe",
    "plan",
    "device",
];
/// Each nvcc takes about a gigabyte.
const JOBS: usize = 2;

struct Toolkit {
    nvcc: PathBuf,
    /// Has libcudart_static.a.
    lib: PathBuf,
}

/// Compiles and links everything.
///
/// # Errors
/// A sentence for the person who builds.
pub fn compile_kernels() -> Result<(), String> {
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-changed=build/nvcc.rs");
    let archs = architectures()?;
    println!("cargo::rustc-env=MOEYARD_CUDA_ARCHS={}", archs.join(","));
    if variable("MOEYARD_CUDA_TYPE_CHECK").is_some() {
        // `cargo check` and `cargo clippy` need no kernels; linking such a build fails.
        return Ok(());
    }
    let toolkit = Toolkit::find()?;
    // cc reads this; set before any thread starts.
    // SAFETY: the build script has one thread here.
    unsafe { env::set_var("NVCC", &toolkit.nvcc) };
    let queue = std::sync::Mutex::new(FAMILIES.iter());
    let failures = std::sync::Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..JOBS {
            scope.spawn(|| {
                loop {
                    let Some(family) = queue.lock().unwrap().next() else { return };
                    if let Err(why) = compile(family, &archs) {
                        failures.lock().unwrap().push(why);
                    }
                }
            });
        }
    });
    if let Some(why) = failures.into_inner().unwrap().into_iter().next() {
        return Err(why);
    }
    // After all kernels: static archives are searched in order.
    for family in FAMILIES {
        println!("cargo::rustc-link-lib=static=moeyard_{family}");
    }
    link_runtime(&toolkit)
}

impl Toolkit {
    /// `CUDA_HOME` or `CUDA_PATH`, else the nvcc on `PATH`, else /usr/local/cuda.
    fn find() -> Result<Toolkit, String> {
        let named = ["CUDA_HOME", "CUDA_PATH"].iter().find_map(|name| variable(name));
        let home = named.map(PathBuf::from).or_else(on_path).unwrap_or_else(|| "/usr/local/cuda".into());
        let nvcc = home.join("bin/nvcc");
        if !nvcc.is_file() {
            return Err(format!(
                "the feature `cuda` needs nvcc, and {} does not exist: run `eval \"$(scripts/setup-cuda.sh)\"` or set \
                 CUDA_HOME to a CUDA toolkit, 12.8 or newer",
                nvcc.display()
            ));
        }
        // A system toolkit has lib64 or targets; the wheels of PyPI have lib.
        let lib = ["lib64", "lib", "targets/x86_64-linux/lib"]
            .iter()
            .map(|folder| home.join(folder))
            .find(|folder| folder.join("libcudart_static.a").is_file())
            .ok_or_else(|| format!("no libcudart_static.a under {}", home.display()))?;
        Ok(Toolkit { nvcc, lib })
    }
}

fn variable(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn on_path() -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
        .and_then(|nvcc| Some(nvcc.canonicalize().ok()?.parent()?.parent()?.to_path_buf()))
}

/// `MOEYARD_CUDA_ARCHS`, such as "80,90a,100a".
fn architectures() -> Result<Vec<String>, String> {
    let list = variable("MOEYARD_CUDA_ARCHS").unwrap_or_else(|| "80,90a".to_owned());
    let archs: Vec<String> = list.split(',').map(|a| a.trim().to_owned()).collect();
    for arch in &archs {
        let digits = arch.trim_end_matches(|c: char| c.is_ascii_lowercase());
        if !digits.parse::<u32>().is_ok_and(|n| n >= 80) {
            return Err(format!(
                "MOEYARD_CUDA_ARCHS: expected a list such as 80,90a of 80 or newer, found {list}"
            ));
        }
    }
    Ok(archs)
}

/// Kernels for Hopper's own instructions are empty on any other architecture.
fn written_for<'a>(family: &str, archs: &'a [String]) -> &'a [String] {
    match archs.iter().position(|arch| arch == "90a") {
        Some(at) if ["gemm_sm90", "attention_sm90", "attention_mla"].contains(&family) => &archs[at..=at],
        _ => archs,
    }
}

/// One archive per file: with two in one, cc would compile for separate device linking.
fn compile(family: &str, archs: &[String]) -> Result<(), String> {
    let mut build = cc::Build::new();
    build
        .cuda(true)
        .cudart("none")
        .cpp_link_stdlib(None)
        .cargo_metadata(false)
        // With debug information cc passes -G, which makes kernels useless.
        .debug(false)
        .opt_level(3)
        .warnings(false)
        .flag("-std=c++17")
        .flag("--expt-relaxed-constexpr")
        .flag("-Xcompiler=-fvisibility=hidden")
        .file(Path::new("cuda").join(format!("{family}.cu")));
    for arch in written_for(family, archs) {
        build.flag(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    build.try_compile(&format!("moeyard_{family}")).map_err(|e| format!("cuda/{family}.cu: {e}"))
}

fn link_runtime(toolkit: &Toolkit) -> Result<(), String> {
    let out = env::var("OUT_DIR").map_err(|e| e.to_string())?;
    println!("cargo::rustc-link-search=native={out}");
    println!("cargo::rustc-link-search=native={}", toolkit.lib.display());
    println!("cargo::rustc-link-lib=static=cudart_static");
    // libstdc++ statically too: the binary needs glibc and nothing else.
    let found = Command::new("g++")
        .arg("-print-file-name=libstdc++.a")
        .output()
        .map_err(|e| format!("the feature `cuda` needs g++: {e}"))?;
    let archive = PathBuf::from(String::from_utf8_lossy(&found.stdout).trim());
    match archive.parent() {
        Some(folder) if archive.is_absolute() => {
            println!("cargo::rustc-link-search=native={}", folder.display());
        }
        _ => return Err("g++ has no libstdc++.a: install it (libstdc++-dev)".to_owned()),
    }
    println!("cargo::rustc-link-lib=static=stdc++");
    for library in ["dl", "rt", "pthread"] {
        println!("cargo::rustc-link-lib=dylib={library}");
    }
    Ok(())
}
