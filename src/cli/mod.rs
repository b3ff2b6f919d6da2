//! The command line: `moeyard serve | generate | verify | inspect`.

mod devices;
mod embedded;
mod generate;
pub mod inspect;
pub mod launch;
pub mod model;
mod progress;
mod serve;
pub mod verify;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::{RawOptions, file};
use crate::error::{Error, Result};

/// A Mixture-of-Experts serving engine built around expert parallelism.
#[derive(Parser)]
#[command(name = "moeyard", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a model over an OpenAI-compatible HTTP endpoint
    Serve(Run),
    /// Continue a prompt on the terminal
    Generate(generate::Arguments),
    /// Run the prompts of a moe-fixture-dump/1 file and write the engine's dump in the same schema
    Verify(verify::Arguments),
    /// Show what a model is and what each rank would hold
    Inspect(Run),
}

/// A model and how to run it.
#[derive(Args)]
struct Run {
    /// Checkpoint folder in Hugging Face layout [default: the embedded demo model]
    #[arg(value_name = "MODEL_DIR")]
    model: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// Options of the command line and the file that may hold the same.
#[derive(Args)]
struct Settings {
    /// TOML file with the same keys as the flags; flags win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: RawOptions,
}

impl Settings {
    fn read(self) -> Result<RawOptions> {
        let from_file = self.config.map(|path| file::read(&path)).transpose()?.unwrap_or_default();
        Ok(self.flags.or(from_file))
    }
}

/// Entry point of the binary.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_env("MOEYARD_LOG").unwrap_or_else(|_| EnvFilter::new("info")))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    let outcome = match cli.command {
        Command::Serve(run) => serve::run(run),
        Command::Generate(arguments) => generate::run(arguments),
        Command::Verify(arguments) => verify::run(arguments),
        Command::Inspect(run) => inspect::run(run),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            exit_code(&error)
        }
    }
}

/// 2: what was given cannot be run. 1: it was run and failed.
fn exit_code(error: &Error) -> ExitCode {
    match error {
        Error::Checkpoint(_)
        | Error::Config { .. }
        | Error::Memory { .. }
        | Error::Request { .. }
        | Error::Io { .. }
        | Error::Routing(_) => ExitCode::from(2),
        Error::Busy { .. } | Error::Device { .. } | Error::Peer { .. } | Error::Stopped(_) => {
            ExitCode::from(1)
        }
    }
}
