//! The command line: one file per subcommand.
//!
//! Exit codes: 0 success, 1 the machine failed (a file cannot be read or written), 2 the input or the command line is
//! wrong.

mod input;
mod output;
mod convert;
mod synth;
mod place;
mod split;
mod simulation;
mod summary;
mod findings;
mod replay;
mod compare;
mod advise;
mod report;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use router_sim::{Error, Result};

/// How imbalanced is this model on this traffic, what does it cost, and what would fix it?
///
/// Reads recorded routing of many tools, or makes synthetic traffic, and answers without a GPU.
#[derive(Parser)]
#[command(name = "router-sim", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  router-sim convert record.pt load.npy          SGLang's recorder output to a load matrix
  router-sim convert demo.moetrace demo.moeroute  the demo models' traces to moeyard's own format
  router-sim synth traffic.moeroute --like deepseek-v3 --ranks 32 --drift 0.25
  router-sim place --load load.npy --ranks 32 --slots 288 --policy moeyard --out placement.json
  router-sim split --load load.npy --placement placement.json --ranks 32 --split exact --out tokens.npy
  router-sim replay trace.moeroute --ranks 8 --redundant 8 --policy moeyard --split exact
  router-sim compare --fit monday.moeroute --on tuesday.moeroute --ranks 8 --redundant 0,8
  router-sim advise trace.moeroute --ranks 8 --html advice.html
  router-sim report found.json --html report.html

Every input may be in any known format; `router-sim convert --help` lists them.
Ask each command for its own examples: router-sim convert --help";

#[derive(Subcommand)]
enum Command {
    /// Turn routing records and placements of one tool into those of another
    Convert(convert::Arguments),
    /// Make up traffic: popularity, drift, bursts, topics, group-limited routing
    Synth(synth::Arguments),
    /// Plan where experts live
    Place(place::Arguments),
    /// Share out recorded loads among the slots of a placement
    Split(split::Arguments),
    /// Run tokens through a placement, a split and a cluster, step by step
    Replay(Box<replay::Arguments>),
    /// Run many alternatives on the same tokens, side by side
    Compare(Box<compare::Arguments>),
    /// How many redundant slots, which split, and is rebalancing worth it?
    Advise(Box<advise::Arguments>),
    /// Show what replay, compare or advise found: as text, CSV or one HTML page
    Report(report::Arguments),
}

/// Entry point of the binary.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Convert(arguments) => convert::run(arguments),
        Command::Synth(arguments) => synth::run(arguments),
        Command::Place(arguments) => place::run(arguments),
        Command::Split(arguments) => split::run(arguments),
        Command::Replay(arguments) => replay::run(*arguments),
        Command::Compare(arguments) => compare::run(*arguments),
        Command::Advise(arguments) => advise::run(*arguments),
        Command::Report(arguments) => report::run(arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("router-sim: {error}");
            exit_code(&error)
        }
    }
}

/// The one place where errors become exit codes.
fn exit_code(error: &Error) -> ExitCode {
    match error {
        Error::Description(_)
        | Error::Placement(_)
        | Error::Impossible(_)
        | Error::Trace { .. }
        | Error::Record { .. }
        | Error::File { .. } => ExitCode::from(2),
        Error::Io { .. } => ExitCode::FAILURE,
    }
}

/// Prints to standard output; a closed pipe ends the program quietly, as with other command-line tools.
fn print(text: &str) -> Result<()> {
    use std::io::{ErrorKind, Write};
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(source) => Err(Error::Io { path: "standard output".into(), source }),
        Ok(()) => Ok(()),
    }
}
