//! The `router-sim` binary: what would another placement, policy, split or cluster give on this trace?

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
