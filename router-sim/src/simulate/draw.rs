//! Tokens drawn from loads: batches whose experts are chosen with the shares of a load matrix.
//!
//! Every token gets `top_k` distinct experts, each with exactly its share as probability, by systematic sampling in
//! random order (Madow: On the theory of systematic sampling, 1949): the experts, shuffled anew for every layer of every
//! batch, lie side by side on a line of length `top_k`, and the token takes those that `u, u + 1, ..., u + top_k - 1` hit.
//! The load of an expert in a batch is then binomial, as if tokens came independently from the recorded traffic. What a
//! load matrix does not know is drawn away: which experts go together, and what the tokens of one request share.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::load::{LoadWindow, Phase};
use crate::stream::{TokenBatch, TokenRow, TokenShape, TokenStream};
use crate::trace::RowInfo;
use crate::{Error, Result};

/// Batches drawn from loads.
#[derive(Debug, Clone)]
pub struct Drawn {
    shape: TokenShape,
    /// The loads that batches are drawn from in turn, each phase apart: `(phase, [layers][experts])`, probabilities that
    /// sum to `top_k` in each layer.
    shares: Vec<(Phase, Vec<f64>)>,
    rows: usize,
    batches: u64,
    next: u64,
    rng: ChaCha8Rng,
    /// `[experts]`: the line, shuffled.
    order: Vec<u16>,
    /// `[experts]`: where each of `order` ends on the line.
    ends: Vec<f64>,
    /// For equal pieces of the line, the first of `order` that ends behind the piece's beginning.
    guide: Vec<u16>,
}

/// What to draw.
#[derive(Debug, Clone, Copy)]
pub struct DrawOptions {
    /// Experts per token.
    pub top_k: usize,
    /// Tokens per batch.
    pub rows: usize,
    /// Batches in all.
    pub batches: u64,
    /// The same seed gives the same tokens.
    pub seed: u64,
}

impl Drawn {
    /// Batches drawn from the windows in turn: a recording of several steps comes back in its order of time.
    ///
    /// An expert whose share of the load is more than any can have with `top_k` distinct experts gets every token, and
    /// the others share out the rest.
    ///
    /// # Errors
    /// [`Error::Impossible`] without windows or with more than the experts per token.
    pub fn new(windows: &[LoadWindow], options: DrawOptions) -> Result<Drawn> {
        let Some(first) = windows.first() else {
            return Err(Error::Impossible("there is no load to draw from".into()));
        };
        let experts = first.experts();
        let DrawOptions { top_k, rows, batches, seed } = options;
        if top_k == 0 || top_k > experts || experts > 1 << 16 {
            return Err(Error::Impossible(format!(
                "top-k {top_k} is not within 1..={experts} experts, of which there may be {}",
                1 << 16
            )));
        }
        if rows == 0 || rows.checked_mul(first.layers() * top_k).is_none_or(|ids| ids > 1 << 31) {
            return Err(Error::Impossible(format!(
                "a batch of {rows} tokens x {} layers x top-k {top_k} is not within 1..=2^31 choices",
                first.layers()
            )));
        }
        let shares = windows.iter().flat_map(|window| phases_of(window, top_k)).collect();
        let shape =
            TokenShape { layer_ids: first.layer_ids().to_vec(), experts, top_k, ..TokenShape::default() };
        let rng = ChaCha8Rng::seed_from_u64(seed);
        let order = (0..experts as u16).collect();
        Ok(Drawn { shape, shares, rows, batches, next: 0, rng, order, ends: Vec::new(), guide: Vec::new() })
    }

    /// Draws one layer; appends `[rows][top_k]` ids.
    fn draw_layer(&mut self, probabilities: std::ops::Range<usize>, window: usize, ids: &mut Vec<u16>) {
        let top_k = self.shape.top_k;
        shuffle(&mut self.order, &mut self.rng);
        let shares = &self.shares[window].1[probabilities];
        self.ends.clear();
        let mut end = 0.0;
        for &expert in &self.order {
            end += shares[usize::from(expert)];
            self.ends.push(end);
        }
        // Rounding must not leave the last hit without an expert.
        let last = self.order.iter().rposition(|e| shares[usize::from(*e)] > 0.0).unwrap_or(0);
        let pieces_per_unit = (2 * self.order.len()) as f64 / top_k as f64;
        self.guide.clear();
        let mut at = 0;
        for piece in 0..=2 * self.order.len() {
            while at < last && self.ends[at] <= piece as f64 / pieces_per_unit {
                at += 1;
            }
            self.guide.push(at as u16);
        }
        for _ in 0..self.rows {
            let start = unit(&mut self.rng);
            let mut free = 0;
            for hit in 0..top_k {
                let hit = start + hit as f64;
                let mut at = free.max(usize::from(self.guide[(hit * pieces_per_unit) as usize]));
                while at < last && self.ends[at] <= hit {
                    at += 1;
                }
                ids.push(self.order[at]);
                free = (at + 1).min(last);
            }
        }
    }
}

impl TokenStream for Drawn {
    fn shape(&self) -> &TokenShape {
        &self.shape
    }

    fn next_batch(&mut self, batch: &mut TokenBatch) -> Result<bool> {
        batch.clear();
        if self.next == self.batches {
            return Ok(false);
        }
        let window = (self.next % self.shares.len() as u64) as usize;
        let phase = self.shares[window].0;
        batch.step = self.next;
        batch.rows.extend((0..self.rows as u64).map(|row| TokenRow {
            info: RowInfo { request: row, position: self.next, phase, recomputed: false },
            rank: 0,
            label: 0,
        }));
        self.next += 1;
        let (layers, experts) = (self.shape.layers(), self.shape.experts);
        batch.ids.reserve(layers * self.rows * self.shape.top_k);
        for layer in 0..layers {
            self.draw_layer(layer * experts..(layer + 1) * experts, window, &mut batch.ids);
        }
        Ok(true)
    }

    fn skipped(&self) -> u64 {
        0
    }
}

/// The probabilities of each phase of a window that has tokens.
fn phases_of(window: &LoadWindow, top_k: usize) -> Vec<(Phase, Vec<f64>)> {
    let total = |phase| (0..window.layers()).flat_map(|l| window.counts(phase, l)).any(|&n| n > 0);
    let mut phases: Vec<Phase> = Phase::ALL.into_iter().filter(|phase| total(*phase)).collect();
    if phases.is_empty() {
        phases.push(Phase::Prefill);
    }
    let of_layer = |phase, layer| inclusion(window.counts(phase, layer), top_k);
    phases
        .into_iter()
        .map(|phase| (phase, (0..window.layers()).flat_map(|l| of_layer(phase, l)).collect()))
        .collect()
}

/// Probabilities proportional to the counts that sum to `top_k`, none above 1; uniform without counts or with fewer
/// loaded experts than `top_k`.
fn inclusion(counts: &[u64], top_k: usize) -> Vec<f64> {
    let loaded = counts.iter().filter(|&&n| n > 0).count();
    if loaded < top_k {
        return vec![top_k as f64 / counts.len() as f64; counts.len()];
    }
    let mut certain = vec![false; counts.len()];
    loop {
        let left: f64 = counts.iter().zip(&certain).filter(|(_, c)| !**c).map(|(&n, _)| n as f64).sum();
        let places = top_k as f64 - certain.iter().filter(|c| **c).count() as f64;
        let share = |n: u64| if left > 0.0 { n as f64 * places / left } else { 0.0 };
        let before = certain.iter().filter(|c| **c).count();
        for (sure, &n) in certain.iter_mut().zip(counts) {
            *sure |= share(n) >= 1.0;
        }
        if certain.iter().filter(|c| **c).count() == before {
            return counts
                .iter()
                .zip(&certain)
                .map(|(&n, &sure)| if sure { 1.0 } else { share(n) })
                .collect();
        }
    }
}

/// A number in [0, 1).
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Fisher and Yates.
pub(super) fn shuffle<T>(order: &mut [T], rng: &mut ChaCha8Rng) {
    for i in (1..order.len()).rev() {
        // The bias of a 64-bit product is far below what any run could show.
        let j = ((u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64) as usize;
        order.swap(i, j);
    }
}
