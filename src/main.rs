//! The `moeyard` binary: everything is in [`moeyard::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    moeyard::cli::main()
}
