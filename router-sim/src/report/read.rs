//! Report files: the JSON form of [`Report`], checked so that whatever shows one may index it.

use std::path::Path;

use super::data::{Report, Run};
use crate::formats::source;
use crate::{Error, Result};

/// The version that is written and read.
const VERSION: u32 = 1;

impl Report {
    /// Reads a report.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] with what does not fit.
    pub fn read(path: &Path) -> Result<Report> {
        let text = source::read_whole(path, None)?;
        let refuse = |why: String| Error::File { path: path.into(), why };
        let report: Report = serde_json::from_slice(&text).map_err(|e| refuse(format!("no report: {e}")))?;
        report.check().map_err(refuse)?;
        Ok(report)
    }

    /// Writes a report, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] with what a reader would refuse.
    pub fn write(&self, path: &Path) -> Result<()> {
        let refuse = |why: String| Error::File { path: path.into(), why };
        self.check().map_err(refuse)?;
        let text = serde_json::to_string(self).map_err(|e| refuse(e.to_string()))?;
        source::write_text(path, &text)
    }

    /// The run that is compared with the first one: what was recommended, otherwise the fastest of the others.
    pub fn choice(&self) -> Option<&Run> {
        let advised =
            self.advice.as_ref().and_then(|advice| self.runs.iter().find(|run| run.name == advice.choice));
        let others = self.runs.iter().skip(1);
        advised.or_else(|| others.min_by(|a, b| a.totals.step_us.total_cmp(&b.totals.step_us)))
    }

    /// Sizes that belong together agree.
    fn check(&self) -> Result<(), String> {
        let layers = self.subject.layer_ids.len();
        if self.version != VERSION {
            return Err(format!("report version {} is unknown, expected {VERSION}", self.version));
        }
        if self.runs.is_empty() {
            return Err("a report without runs".into());
        }
        rectangular("expert_tokens", &self.expert_tokens, layers)?;
        for run in &self.runs {
            let named = |what: &str| format!("run {:?}: {what}", run.name);
            if !run.layers.is_empty() && run.layers.len() != layers {
                return Err(named(&format!("{} layers, expected {layers}", run.layers.len())));
            }
            rectangular(&named("rank_tokens"), &run.rank_tokens, layers)?;
            let ranks = run.traffic.bytes.len();
            if let Some(row) = run.traffic.bytes.iter().find(|row| row.len() != ranks) {
                return Err(named(&format!("traffic of {ranks} sources to {} destinations", row.len())));
            }
        }
        Ok(())
    }
}

/// `[layers][n]`, or nothing at all.
fn rectangular(name: &str, rows: &[Vec<u64>], layers: usize) -> Result<(), String> {
    let width = rows.first().map_or(0, Vec::len);
    if !rows.is_empty() && rows.len() != layers {
        return Err(format!("{name}: {} layers, expected {layers}", rows.len()));
    }
    match rows.iter().find(|row| row.len() != width) {
        Some(row) => Err(format!("{name}: a layer of {} among layers of {width}", row.len())),
        None => Ok(()),
    }
}
