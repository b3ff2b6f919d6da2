//! `moeyard bench`: the engine without HTTP, or a server under load.

mod client;
mod engine;
mod report;
mod serve;
mod workload;

use clap::{Args, Subcommand};

use crate::error::Result;

/// `moeyard bench`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
#[group(skip)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    engine: engine::Arguments,
}

#[derive(Subcommand)]
enum What {
    /// Send requests to an OpenAI-compatible server and measure its answers
    #[command(after_help = serve::EXAMPLES)]
    Serve(serve::Arguments),
}

/// Measures and prints.
pub(super) fn run(arguments: Arguments) -> Result<()> {
    match arguments.what {
        Some(What::Serve(arguments)) => serve::run(arguments),
        None => engine::run(arguments.engine),
    }
}
