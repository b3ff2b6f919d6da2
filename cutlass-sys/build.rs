//! Compiles src/ with nvcc against CUTLASS's headers when the feature `kernels` is on, and links the CUDA runtime statically, so that
//! a program starts on machines without CUDA.

#[cfg(feature = "kernels")]
#[path = "../build/toolkit.rs"]
mod toolkit;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "kernels")]
    if let Err(why) = kernels::compile() {
        // One sentence, not a backtrace.
        println!("cargo::error={why}");
    }
}

#[cfg(feature = "kernels")]
mod kernels {
    use std::env;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::toolkit::{Toolkit, architectures, emulator, hopper_only, type_check_only, variable};

    pub fn compile() -> Result<(), String> {
        for path in ["src", "../build/toolkit.rs", "../cuda"] {
            println!("cargo::rerun-if-changed={path}");
        }
        let archs = architectures()?;
        if let Some(folder) = emulator() {
            println!("cargo::rustc-link-search=native={folder}");
            println!("cargo::rustc-link-lib=dylib=cuda");
        }
        if type_check_only() {
            return Ok(());
        }
        let toolkit = Toolkit::find()?;
        let headers = cutlass_headers()?;
        let name = "moeyard_grouped_gemm";
        toolkit.compile(Path::new("src/grouped_gemm.cu"), name, hopper_only(&archs), &[&headers])?;
        let out = env::var("OUT_DIR").map_err(|e| e.to_string())?;
        println!("cargo::rustc-link-search=native={out}");
        println!("cargo::rustc-link-lib=static={name}");
        link_runtime(&toolkit)
    }

    fn cutlass_headers() -> Result<PathBuf, String> {
        let Some(home) = variable("CUTLASS_HOME") else {
            return Err("the feature `cuda` needs CUTLASS: run `eval \"$(scripts/setup-cuda.sh)\"` or set CUTLASS_HOME to a \
                        checkout of CUTLASS 4.2 or newer"
                .to_owned());
        };
        let headers = Path::new(&home).join("include");
        if headers.join("cute/tensor.hpp").is_file() {
            Ok(headers)
        } else {
            Err(format!("CUTLASS_HOME: {} has no cute/tensor.hpp", headers.display()))
        }
    }

    fn link_runtime(toolkit: &Toolkit) -> Result<(), String> {
        // A system toolkit has lib64 or targets; the wheels of PyPI have lib.
        let folder = ["lib64", "lib", "targets/x86_64-linux/lib"]
            .iter()
            .map(|folder| toolkit.home.join(folder))
            .find(|folder| folder.join("libcudart_static.a").is_file())
            .ok_or_else(|| format!("no libcudart_static.a under {}", toolkit.home.display()))?;
        println!("cargo::rustc-link-search=native={}", folder.display());
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
}
