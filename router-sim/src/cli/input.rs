//! Flags of every command that reads routing records, and the progress bar.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use router_sim::Result;
use router_sim::formats::{self, Format, Options};
use router_sim::load::{LoadWindow, Phase};

/// How to read input files.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Reading")]
pub struct InputFlags {
    /// Read the input as this format instead of recognising it
    #[arg(long, value_name = "FORMAT", value_parser = format_parser())]
    pub input_format: Option<Format>,
    /// Leave unusable records out and count them, rather than stop at the first
    #[arg(long)]
    pub lenient: bool,
    /// Experts per layer, where the input does not say [default: the largest expert seen]
    #[arg(long, value_name = "N")]
    pub experts: Option<usize>,
    /// Index of the first MoE layer in the model, where the input does not say [default: 0]
    #[arg(long, value_name = "N")]
    pub first_layer: Option<usize>,
    /// Phase of the tokens, where the input does not say [default: prefill]
    #[arg(long, value_name = "PHASE")]
    pub phase: Option<PhaseFlag>,
    /// Multiply loads and round: for shares or averages instead of counts
    #[arg(long, value_name = "FACTOR")]
    pub scale: Option<f64>,
}

/// A phase by name.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PhaseFlag {
    /// Prompt tokens
    Prefill,
    /// Generated tokens
    Decode,
}

fn format_parser() -> impl clap::builder::TypedValueParser<Value = Format> {
    use clap::builder::{PossibleValuesParser, TypedValueParser};
    PossibleValuesParser::new(Format::ALL.map(Format::name))
        .map(|name| name.parse().expect("one of the possible values"))
}

impl InputFlags {
    /// The load of a whole file, summed over its steps.
    pub fn total_load(&self, file: &Path) -> Result<LoadWindow> {
        let (path, options) = self.options(file);
        let (load, skipped) = formats::read_total(&path, &options)?;
        tell_skipped(file, skipped);
        Ok(load)
    }

    /// The load of a file as at most `most` windows, neighbours summed where there are more.
    pub fn windows(&self, file: &Path, most: usize) -> Result<Vec<LoadWindow>> {
        let (path, options) = self.options(file);
        let (windows, skipped) = formats::read_windows(&path, &options, most)?;
        tell_skipped(file, skipped);
        Ok(windows)
    }

    /// What the library needs to know, with a progress bar of its own.
    pub fn options(&self, file: &Path) -> (PathBuf, Options) {
        let (path, labels) = split_labels(file);
        let options = Options {
            format: self.input_format,
            lenient: self.lenient,
            experts: self.experts,
            first_layer: self.first_layer,
            phase: self.phase.map(|phase| match phase {
                PhaseFlag::Prefill => Phase::Prefill,
                PhaseFlag::Decode => Phase::Decode,
            }),
            scale: self.scale,
            batch_rows: None,
            labels,
            progress: progress(&path),
        };
        (path, options)
    }
}

/// Says on standard error how many records a lenient reader left out.
pub fn tell_skipped(file: &Path, skipped: u64) {
    if skipped > 0 {
        eprintln!("router-sim: {}: {skipped} unusable records left out", file.display());
    }
}

/// `FILE#LABEL,LABEL`, unless a file has that very name.
fn split_labels(file: &Path) -> (PathBuf, Vec<String>) {
    match file.to_str().and_then(|text| text.rsplit_once('#')) {
        Some((path, labels)) if !file.exists() => {
            (path.into(), labels.split(',').map(str::to_owned).collect())
        }
        _ => (file.into(), Vec::new()),
    }
}

/// A bar over the runs of a sweep, hidden unless standard error is a terminal.
pub fn points_bar(points: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{pos}/{len} runs {wide_bar} {eta}");
    ProgressBar::new(points as u64).with_style(style.expect("a template that is a constant"))
}

/// A bar on standard error, when that is a terminal. It goes away at the end of the file.
fn progress(path: &Path) -> Option<formats::Progress> {
    if !std::io::stderr().is_terminal() {
        return None;
    }
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}")
        .expect("a template that is a constant");
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let bar = ProgressBar::new(0).with_style(style).with_message(name);
    Some(Arc::new(move |read, bytes| {
        bar.set_length(bytes.max(read));
        bar.set_position(read);
        if read >= bytes {
            bar.finish_and_clear();
        }
    }))
}
