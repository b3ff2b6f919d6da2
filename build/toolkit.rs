//! Part of the build scripts of moeyard and of cutlass-sys: finds the CUDA toolkit and compiles one kernel family into a static archive.

use std::env;
use std::path::{Path, PathBuf};

/// A CUDA toolkit.
pub struct Toolkit {
    #[allow(dead_code, reason = "only cutlass-sys links the runtime")]
    pub home: PathBuf,
}

impl Toolkit {
    /// `CUDA_HOME` or `CUDA_PATH`, else the nvcc on `PATH`, else /usr/local/cuda. Called before any thread starts.
    ///
    /// # Errors
    /// A sentence for the person who builds.
    pub fn find() -> Result<Toolkit, String> {
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
        // cc reads this, and knows a compiler named otherwise not as nvcc.
        // SAFETY: a build script has one thread here.
        unsafe { env::set_var("NVCC", &nvcc) };
        Ok(Toolkit { home })
    }

    /// Compiles `file` for `archs` into the archive `name`. One archive per file: with two in one, cc would compile for separate device
    /// linking.
    ///
    /// # Errors
    /// The file and what nvcc said.
    pub fn compile(
        &self,
        file: &Path,
        name: &str,
        archs: &[String],
        includes: &[&Path],
    ) -> Result<(), String> {
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
            .file(file);
        for include in includes {
            build.flag("-isystem").flag(include);
        }
        for arch in archs {
            build.flag(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        }
        build.try_compile(name).map_err(|e| format!("{}: {e}", file.display()))
    }
}

/// A variable of the environment that is set and not empty; cargo builds anew when it changes.
pub fn variable(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether no kernels are wanted: `cargo check` and `cargo clippy` need none; linking such a build fails, unless an emulated GPU has them.
pub fn type_check_only() -> bool {
    variable("MOEYARD_CUDA_TYPE_CHECK").is_some() || emulator().is_some()
}

/// The folder of an emulated GPU that stands in for every kernel: see scripts/emulate-gpu.sh.
pub fn emulator() -> Option<String> {
    variable("MOEYARD_CUDA_EMULATOR")
}

fn on_path() -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
        .and_then(|nvcc| Some(nvcc.canonicalize().ok()?.parent()?.parent()?.to_path_buf()))
}

/// `MOEYARD_CUDA_ARCHS`, such as "80,90a,100a".
///
/// # Errors
/// A sentence for the person who builds.
pub fn architectures() -> Result<Vec<String>, String> {
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

/// What a file of kernels for Hopper's own instructions is compiled for: it is empty on any other architecture.
pub fn hopper_only(archs: &[String]) -> &[String] {
    match archs.iter().position(|arch| arch == "90a") {
        Some(at) => &archs[at..=at],
        None => archs,
    }
}
