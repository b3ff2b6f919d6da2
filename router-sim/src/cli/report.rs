//! `router-sim report`: what a simulation found, for people, spreadsheets and browsers.

use std::path::PathBuf;

use clap::Args;
use router_sim::Result;
use router_sim::formats::source::write_text;
use router_sim::report::data::Report;
use router_sim::report::{csv, html};

use super::summary;

const EXAMPLES: &str = "\
Examples:
  router-sim compare trace.moeroute --ranks 8 --redundant 8 --json found.json
  router-sim report found.json                                     the summary again
  router-sim report found.json --html report.html                  one file for a browser: no script, nothing from outside
  router-sim report found.json --csv runs.csv --layers-csv layers.csv";

/// What to show and where.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// What replay, compare or advise wrote with --json
    #[arg(value_name = "REPORT.json")]
    report: PathBuf,
    /// Write one HTML file with everything in it
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write a row per run
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write a row per run and layer
    #[arg(long, value_name = "FILE")]
    layers_csv: Option<PathBuf>,
}

pub fn run(arguments: Arguments) -> Result<()> {
    let Arguments { report, html, csv, layers_csv } = arguments;
    let report = Report::read(&report)?;
    let asked = [(&html, html::page as fn(&Report) -> String), (&csv, csv::runs), (&layers_csv, csv::layers)];
    for (path, text) in asked {
        if let Some(path) = path {
            write_text(path, &text(&report))?;
            super::print(&format!("{}\n", path.display()))?;
        }
    }
    match asked.iter().any(|(path, _)| path.is_some()) {
        true => Ok(()),
        false => super::print(&text(&report)),
    }
}

/// The table of all runs, and the recommended one by itself.
fn text(report: &Report) -> String {
    let shown = report.choice().unwrap_or(&report.runs[0]);
    let mut text = String::new();
    if report.runs.len() > 1 {
        text = summary::table(&report.runs) + "\n";
    }
    text += &summary::of_run(shown);
    if let Some(advice) = &report.advice {
        text += &format!("\n{}", summary::of_advice(advice));
    }
    text
}
