//! Batches of tokens with the experts that the router chose for each.

use crate::Result;
use crate::load::{LoadWindow, Phase};
use crate::trace::RowInfo;

/// What all batches of a stream share.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenShape {
    /// The model's name or family, empty when nobody said.
    pub model: String,
    /// Absolute indices of the MoE layers, ascending.
    pub layer_ids: Vec<usize>,
    /// Logical experts per layer.
    pub experts: usize,
    /// Experts chosen per token and layer.
    pub top_k: usize,
    /// Ranks that owned the tokens where they were recorded; `None` when that is not known and every rank reads 0.
    pub ranks: Option<usize>,
    /// Kinds of traffic that rows are marked with (a data set, a topic); empty when rows are not marked.
    pub labels: Vec<String>,
    /// Batches carry router weights.
    pub weights: bool,
}

impl TokenShape {
    /// MoE layers.
    pub fn layers(&self) -> usize {
        self.layer_ids.len()
    }

    /// Expert ids of one token over all layers.
    pub fn ids_per_row(&self) -> usize {
        self.layers() * self.top_k
    }

    /// A window for the tokens of this stream, without any yet.
    pub fn empty_window(&self) -> LoadWindow {
        LoadWindow::new(&self.layer_ids, self.experts)
    }
}

/// One token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRow {
    /// Request, position, phase.
    pub info: RowInfo,
    /// The rank that owned it; 0 when that is not known.
    pub rank: u32,
    /// Index into [`TokenShape::labels`]; 0 when rows are not marked.
    pub label: u16,
}

/// Tokens that ran, or may run, in one step. Refilled by [`TokenStream::next_batch`]: its memory is reused.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenBatch {
    /// Number of the step, ascending; batches of formats without steps count from 0.
    pub step: u64,
    /// Start of the step in microseconds since the start of the run; 0 when not recorded.
    pub start_us: u64,
    /// How long it took in microseconds; 0 when not recorded.
    pub duration_us: u64,
    /// The tokens. Where ranks are known, those of rank 0 come first, then those of rank 1.
    pub rows: Vec<TokenRow>,
    /// `[layers][rows][top_k]` expert ids, each below [`TokenShape::experts`], best first.
    pub ids: Vec<u16>,
    /// Router weights, same shape as `ids`; empty when the stream has none.
    pub weights: Vec<f32>,
}

impl TokenBatch {
    /// Empties the batch; keeps its memory.
    pub fn clear(&mut self) {
        (self.step, self.start_us, self.duration_us) = (0, 0, 0);
        self.rows.clear();
        self.ids.clear();
        self.weights.clear();
    }

    /// Rows of prefill and of decode.
    pub fn phase_rows(&self) -> [u64; 2] {
        Phase::ALL.map(|phase| self.rows.iter().filter(|row| row.info.phase == phase).count() as u64)
    }

    /// Expert ids of one layer of `layers`; `[rows][top_k]`.
    pub fn layer(&self, layer: usize, layers: usize) -> &[u16] {
        let width = self.ids.len() / layers;
        &self.ids[layer * width..(layer + 1) * width]
    }

    /// Adds one to the load of every expert chosen here, for each time it was chosen.
    ///
    /// # Panics
    /// When the window is not of the stream's shape.
    pub fn add_to(&self, load: &mut LoadWindow) {
        if self.rows.is_empty() {
            return;
        }
        let layers = load.layers();
        let top_k = self.ids.len() / (layers * self.rows.len());
        for layer in 0..layers {
            let choices = self.layer(layer, layers);
            for phase in Phase::ALL {
                let counts = load.counts_mut(phase, layer);
                let rows = self.rows.iter().zip(choices.chunks_exact(top_k));
                for (_, ids) in rows.filter(|(row, _)| row.info.phase == phase) {
                    for &id in ids {
                        let count = &mut counts[usize::from(id)];
                        *count = count.saturating_add(1);
                    }
                }
            }
        }
    }
}

/// Batches of tokens in the order of time.
pub trait TokenStream {
    /// What all batches share.
    fn shape(&self) -> &TokenShape;

    /// Fills `batch`, whatever it held, with the next tokens, at least one; false at the end.
    ///
    /// # Errors
    /// The record that is unusable. Reading may go on behind it: the next call takes the next record or says that the
    /// stream is over. A lenient stream does so itself and counts.
    fn next_batch(&mut self, batch: &mut TokenBatch) -> Result<bool>;

    /// Records that a lenient stream has left out so far.
    fn skipped(&self) -> u64;
}

impl<T: TokenStream + ?Sized> TokenStream for Box<T> {
    fn shape(&self) -> &TokenShape {
        (**self).shape()
    }

    fn next_batch(&mut self, batch: &mut TokenBatch) -> Result<bool> {
        (**self).next_batch(batch)
    }

    fn skipped(&self) -> u64 {
        (**self).skipped()
    }
}
