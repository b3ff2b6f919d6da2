//! Files for what a simulation found, beside the text on standard output.

use std::path::PathBuf;

use clap::Args;
use router_sim::Result;
use router_sim::formats::source::write_text;
use router_sim::report::data::Report;
use router_sim::report::html;

/// Files to write besides the text on standard output.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Findings")]
pub struct FindingsFlags {
    /// Write everything that was found as JSON; `router-sim report` shows it
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write everything that was found as one HTML page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl FindingsFlags {
    /// Writes the files that were asked for.
    pub fn write(&self, report: &Report) -> Result<()> {
        if let Some(path) = &self.json {
            report.write(path)?;
        }
        match &self.html {
            Some(path) => write_text(path, &html::page(report)),
            None => Ok(()),
        }
    }
}
