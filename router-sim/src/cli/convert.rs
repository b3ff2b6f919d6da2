//! `router-sim convert`: records of one tool to those of another.

use std::path::PathBuf;

use clap::Args;
use router_sim::formats::{self, Format, Input, write};
use router_sim::stream::{LoadStream, TokenLoads, TokenShape};
use router_sim::{Error, Result};

use super::input::{InputFlags, tell_skipped};

const EXAMPLES: &str = "\
Examples:
  router-sim convert demo-mixtral.moetrace demo.moeroute      to moeyard's own trace
  router-sim convert demo-mixtral.moetrace#novel load.npy     tokens labelled `novel`, counted
  router-sim convert routed.npy load.npy --experts 128        vLLM's routed_experts, counted";

/// What to convert.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// File to read; FILE#LABEL,LABEL takes only tokens with one of the labels, `mmlu*` all that begin so
    #[arg(value_name = "INPUT")]
    from: PathBuf,
    /// File to write; its extension says the format unless --output-format does
    #[arg(value_name = "OUTPUT")]
    to: PathBuf,
    /// Write this format
    #[arg(long, value_name = "FORMAT")]
    output_format: Option<Format>,
    #[command(flatten)]
    input: InputFlags,
}

pub fn run(arguments: Arguments) -> Result<()> {
    let Arguments { from, to, output_format, input } = arguments;
    let format = output_format.map_or_else(|| by_extension(&to), Ok)?;
    let (path, options) = input.options(&from);
    let opened = formats::open(&path, &options)?;
    let (written, skipped) = match (opened, format) {
        (Input::Tokens(mut tokens), Format::Trace) => {
            let lost = lost_in_trace(tokens.shape());
            (told(format!("{} tokens", write::trace(&to, &mut tokens)?), lost), tokens.skipped())
        }
        (Input::Tokens(mut tokens), Format::RoutedNpy) => {
            let lost = vec!["requests, positions, phases, ranks and router weights"];
            (told(format!("{} tokens", write::routed_npy(&to, &mut tokens)?), lost), tokens.skipped())
        }
        (Input::Tokens(tokens), Format::LoadNpy) => {
            let mut loads = TokenLoads::new(tokens, 1);
            let lost = vec!["which expert each token chose", "phases"];
            (told(format!("{} windows", write::load_npy(&to, &mut loads)?), lost), loads.skipped())
        }
        (Input::Loads(mut loads), Format::LoadNpy) => {
            (told(format!("{} windows", write::load_npy(&to, &mut loads)?), vec!["phases"]), loads.skipped())
        }
        (Input::Loads(_), Format::Trace | Format::RoutedNpy) => {
            let why = format!("holds loads only; {format} needs the experts of each token");
            return Err(Error::File { path: from, why });
        }
        (_, Format::Moetrace | Format::RoutedNpz | Format::LoadNpz) => {
            return Err(Error::File { path: to, why: format!("{format} is read, but not written") });
        }
    };
    tell_skipped(&from, skipped);
    super::print(&format!("{}: {written}\n", to.display()))
}

fn told(what: String, lost: Vec<&str>) -> String {
    match lost.is_empty() {
        true => what,
        false => format!("{what}; lost: {}", lost.join(", ")),
    }
}

fn lost_in_trace(shape: &TokenShape) -> Vec<&'static str> {
    if shape.labels.is_empty() { Vec::new() } else { vec!["labels"] }
}

fn by_extension(path: &std::path::Path) -> Result<Format> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("npy") => Ok(Format::LoadNpy),
        Some("moeroute") => Ok(Format::Trace),
        extension => Err(Error::File {
            path: path.into(),
            why: format!("extension {extension:?} says no format to write; give --output-format"),
        }),
    }
}
