//! The command line: `moeyard serve | generate | inspect | verify | bench`.

mod bench;
pub mod cluster;
mod devices;
mod embedded;
mod generate;
pub mod inspect;
pub mod launch;
mod log;
pub mod model;
mod progress;
mod serve;
pub mod verify;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{RawOptions, file};
use crate::error::{Error, Result};

/// Shown below the list of commands.
const EXAMPLES: &str = "\
Examples:
  moeyard serve
      serve the small demo model that is inside this binary on http://127.0.0.1:8000
  moeyard serve /srv/models/mixtral-8x7b --expert-parallel-size 4
      serve a checkpoint on four ranks that share its experts
  moeyard generate -p 'Once upon a time' -n 40
      continue a text on the terminal
  moeyard inspect configs/models/deepseek-v3 --expert-parallel-size 32 --cluster configs/clusters/h100-4x8.toml
      what every rank would hold, from a config.json and a description of the cluster alone
  moeyard bench serve http://127.0.0.1:8000 --request-rate 5
      measure a running server

Each command explains itself: moeyard serve --help. Exit codes: 2, what was given cannot run; 1, it ran and failed.
MOEYARD_LOG (error, warn, info, debug, trace) says how much is logged to standard error.";

/// Shown below the flags of `serve`.
const SERVE_EXAMPLES: &str = "\
Examples:
  moeyard serve                                          the demo model, one rank with all cores
  moeyard serve DIR --config yard.toml --port 9000       flags win over the file, which has the same keys
  moeyard serve DIR --expert-parallel-size 4             four ranks, each with sequences of its own and a quarter of the experts
  moeyard serve DIR --tensor-parallel-size 2 --expert-parallel-size 4
                                                         pairs of ranks share attention, four share the experts
  moeyard serve DIR --redundant-experts 8 --placement FILE.json --record-routing run.trace
                                                         copies of hot experts where FILE says, and a trace for router-sim

Then:
  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{\"prompt\": \"Once\", \"max_tokens\": 20}'
  curl http://127.0.0.1:8000/metrics
  curl 'http://127.0.0.1:8000/v1/experts?window=60s&format=csv'";

/// Shown below the flags of `inspect`.
const INSPECT_EXAMPLES: &str = "\
Examples:
  moeyard inspect DIR --expert-parallel-size 8           parameters, and bytes per rank of a checkpoint
  moeyard inspect configs/models/mixtral-8x7b --config configs/mixtral-8x7b-h100x2.toml --cluster configs/clusters/h100-8.toml
                                                         what fits on GPUs that are not here, and what is missing";

/// Shown below the flags of `bench`.
const BENCH_EXAMPLES: &str = "\
Examples:
  moeyard bench                                          the demo model
  moeyard bench DIR --prompt-len 512,2048 --batch 1,16,64 --expert-parallel-size 2
  moeyard bench serve http://127.0.0.1:8000 --request-rate 5
                                                         a server instead of the engine: see moeyard bench serve --help";

/// A Mixture-of-Experts serving engine built around expert parallelism.
#[derive(Parser)]
#[command(name = "moeyard", version, about, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a model over an OpenAI-compatible HTTP endpoint
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(Run),
    /// Continue a prompt on the terminal
    Generate(generate::Arguments),
    /// Show what a model is, what each rank would hold, and whether that fits a cluster
    #[command(after_help = INSPECT_EXAMPLES)]
    Inspect(inspect::Arguments),
    /// Measure the engine without HTTP, or a server under load
    #[command(after_help = BENCH_EXAMPLES)]
    Bench(Box<bench::Arguments>),
    /// Run the prompts of a moe-fixture-dump/1 file and write the engine's dump in the same schema
    Verify(verify::Arguments),
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
    let log = log::Log::start(std::io::stderr().is_terminal());
    let outcome = match cli.command {
        Command::Serve(run) => serve::run(run),
        Command::Generate(arguments) => generate::run(arguments),
        Command::Verify(arguments) => verify::run(arguments),
        Command::Inspect(arguments) => inspect::run(arguments),
        Command::Bench(arguments) => bench::run(*arguments),
    };
    log.finish(outcome.as_ref().err().map(|error| format!("error: {error}")));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit_code(&error),
    }
}

/// Shows a report for people: on standard output, unless JSON for programs goes there.
fn show(text: &str, json: Option<&Path>) {
    if json == Some(Path::new("-")) { eprint!("{text}") } else { print!("{text}") }
}

/// Writes JSON to a file, whole or not at all, or to standard output for `-`.
fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    let text = format!("{value:#}\n");
    if path == Path::new("-") {
        print!("{text}");
        return Ok(());
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = Path::new(&temporary);
    std::fs::write(temporary, text).map_err(|e| Error::io(temporary, e))?;
    std::fs::rename(temporary, path).map_err(|e| Error::io(path, e))
}

/// 2: what was given cannot be run. 1: it was run and failed. 70: a device failed under it.
fn exit_code(error: &Error) -> ExitCode {
    match error {
        Error::Checkpoint(_)
        | Error::Config { .. }
        | Error::Memory { .. }
        | Error::Request { .. }
        | Error::Io { .. }
        | Error::Routing(_) => ExitCode::from(2),
        Error::Busy { .. }
        | Error::Conflict(_)
        | Error::Peer { .. }
        | Error::Remote(_)
        | Error::Stopped(_) => ExitCode::from(1),
        Error::Device { .. } => ExitCode::from(70),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_supervisor_tells_failures_apart_by_the_exit_code() {
        let device = || "cuda:0".to_owned();
        for (error, expected) in [
            (Error::config("port", "taken"), 2),
            (Error::Memory { device: device(), sum: "1 > 0".to_owned() }, 2),
            (Error::Stopped("rank 0 panicked".to_owned()), 1),
            (Error::Device { device: device(), why: "CUDA_ERROR_ILLEGAL_ADDRESS".to_owned() }, 70),
        ] {
            let (found, expected) = (exit_code(&error), ExitCode::from(expected));
            assert_eq!(format!("{found:?}"), format!("{expected:?}"), "{error}");
        }
    }
}
