//! Load windows of text formats, which are read as a whole.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use super::Options;
use super::matrix::check_shape;
use crate::load::{LoadWindow, Phase};
use crate::stream::windows::WindowReader;

/// Windows at hand, and the records that were unusable: those come first, so that a strict reader stops.
#[derive(Debug)]
pub struct Collected {
    path: PathBuf,
    layer_ids: Vec<usize>,
    experts: usize,
    phase: Phase,
    /// Record number and what is wrong with it.
    errors: VecDeque<(u64, String)>,
    /// Record number and `[layers][experts]` tokens.
    windows: VecDeque<(u64, Vec<u64>)>,
    record: u64,
}

impl Collected {
    /// `windows` are record number and `[layers][experts]` tokens each.
    ///
    /// # Errors
    /// Layers or experts beyond the limits, or other than expected.
    pub fn new(
        path: &Path,
        layer_ids: Vec<usize>,
        experts: usize,
        windows: VecDeque<(u64, Vec<u64>)>,
        errors: VecDeque<(u64, String)>,
        options: &Options,
    ) -> Result<Self, String> {
        check_shape(layer_ids.len(), experts)?;
        options.check_experts(experts)?;
        if let Some(pair) = layer_ids.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(format!("layer ids must ascend, but {} follows {}", pair[1], pair[0]));
        }
        let width = layer_ids.len() * experts;
        for (record, window) in &windows {
            assert_eq!(window.len(), width, "record {record}: a count per layer and expert");
        }
        let phase = options.phase();
        Ok(Collected { path: path.into(), layer_ids, experts, phase, errors, windows, record: 0 })
    }
}

impl WindowReader for Collected {
    fn empty_window(&self) -> LoadWindow {
        LoadWindow::new(&self.layer_ids, self.experts)
    }

    fn next_window(&mut self, window: &mut LoadWindow) -> Result<bool, String> {
        if let Some((record, why)) = self.errors.pop_front() {
            self.record = record;
            return Err(why);
        }
        let Some((record, tokens)) = self.windows.pop_front() else { return Ok(false) };
        self.record = record;
        for (layer, counts) in tokens.chunks_exact(self.experts).enumerate() {
            window.counts_mut(self.phase, layer).copy_from_slice(counts);
        }
        Ok(true)
    }

    fn record(&self) -> u64 {
        self.record
    }

    fn path(&self) -> &Path {
        &self.path
    }
}
