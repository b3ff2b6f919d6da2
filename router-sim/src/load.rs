//! Load: tokens routed to each expert over a window of steps, and the figures that say how uneven it is.
//!
//! Counts are integers and stay exact; ratios are for people and reports. None of them divides by zero: no tokens
//! at all is perfect balance.

use crate::{Error, Result};

/// What the tokens of a row were computed for. Heat differs between the two, so load is kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Prompt tokens.
    Prefill,
    /// Generated tokens.
    Decode,
}

impl Phase {
    /// Both, in the order of their numbers.
    pub const ALL: [Phase; 2] = [Phase::Prefill, Phase::Decode];

    /// As metrics and reports call it.
    pub fn label(self) -> &'static str {
        match self {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
        }
    }
}

/// Tokens per MoE layer and expert over a window of steps, prefill and decode apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadWindow {
    experts: usize,
    layer_ids: Vec<usize>,
    /// `[layers][experts]`, flat.
    prefill: Vec<u64>,
    /// `[layers][experts]`, flat.
    decode: Vec<u64>,
}

impl LoadWindow {
    /// A window without tokens. `layer_ids` are the absolute indices of the MoE layers.
    pub fn new(layer_ids: &[usize], experts: usize) -> Self {
        let zeros = vec![0; layer_ids.len() * experts];
        LoadWindow { experts, layer_ids: layer_ids.to_vec(), prefill: zeros.clone(), decode: zeros }
    }

    /// Logical experts per layer.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// MoE layers.
    pub fn layers(&self) -> usize {
        self.layer_ids.len()
    }

    /// Absolute indices of the MoE layers.
    pub fn layer_ids(&self) -> &[usize] {
        &self.layer_ids
    }

    /// The same counts under other absolute indices, for records that do not say theirs.
    ///
    /// # Errors
    /// [`Error::Impossible`] when the number of layers differs.
    pub fn with_layer_ids(mut self, layer_ids: &[usize]) -> Result<Self> {
        if layer_ids.len() != self.layers() {
            return Err(Error::Impossible(format!(
                "a load of {} MoE layers for a placement of {}",
                self.layers(),
                layer_ids.len()
            )));
        }
        self.layer_ids = layer_ids.to_vec();
        Ok(self)
    }

    /// Tokens of each expert of a layer (counted from 0 among the MoE layers) in one phase; `[experts]`.
    pub fn counts(&self, phase: Phase, layer: usize) -> &[u64] {
        let range = layer * self.experts..(layer + 1) * self.experts;
        match phase {
            Phase::Prefill => &self.prefill[range],
            Phase::Decode => &self.decode[range],
        }
    }

    /// The same, to be filled in.
    pub fn counts_mut(&mut self, phase: Phase, layer: usize) -> &mut [u64] {
        let range = layer * self.experts..(layer + 1) * self.experts;
        match phase {
            Phase::Prefill => &mut self.prefill[range],
            Phase::Decode => &mut self.decode[range],
        }
    }

    /// Tokens of each expert of a layer, both phases together; `[experts]`.
    pub fn totals(&self, layer: usize) -> impl ExactSizeIterator<Item = u64> + '_ {
        let prefill = self.counts(Phase::Prefill, layer);
        let decode = self.counts(Phase::Decode, layer);
        prefill.iter().zip(decode).map(|(p, d)| p.saturating_add(*d))
    }

    /// Adds one step's tokens per expert of a layer. Counts stay at their largest value rather than wrap.
    ///
    /// # Panics
    /// When `tokens` is not `[experts]`.
    pub fn add(&mut self, phase: Phase, layer: usize, tokens: &[u32]) {
        assert_eq!(tokens.len(), self.experts, "one count per expert");
        for (sum, n) in self.counts_mut(phase, layer).iter_mut().zip(tokens) {
            *sum = sum.saturating_add(u64::from(*n));
        }
    }

    /// Adds another window: the next steps, or what another rank counted.
    ///
    /// # Errors
    /// [`Error::Impossible`] when layers or experts differ.
    pub fn merge(&mut self, other: &LoadWindow) -> Result<()> {
        if self.experts != other.experts || self.layer_ids != other.layer_ids {
            return Err(Error::Impossible(format!(
                "load windows differ in shape: {} experts in layers {:?} and {} experts in layers {:?}",
                self.experts, self.layer_ids, other.experts, other.layer_ids
            )));
        }
        for (own, more) in [(&mut self.prefill, &other.prefill), (&mut self.decode, &other.decode)] {
            for (sum, n) in own.iter_mut().zip(more) {
                *sum = sum.saturating_add(*n);
            }
        }
        Ok(())
    }

    /// What was added since `earlier`, counts of the same layers and experts. A count that went back counts as 0.
    ///
    /// # Panics
    /// When layers or experts differ.
    #[must_use]
    pub fn since(&self, earlier: &LoadWindow) -> LoadWindow {
        assert_eq!(
            (&self.layer_ids, self.experts),
            (&earlier.layer_ids, earlier.experts),
            "layers and experts of two load windows"
        );
        let minus =
            |now: &[u64], then: &[u64]| now.iter().zip(then).map(|(n, t)| n.saturating_sub(*t)).collect();
        LoadWindow {
            experts: self.experts,
            layer_ids: self.layer_ids.clone(),
            prefill: minus(&self.prefill, &earlier.prefill),
            decode: minus(&self.decode, &earlier.decode),
        }
    }

    /// Starts the next window; keeps the memory.
    pub fn clear(&mut self) {
        self.prefill.fill(0);
        self.decode.fill(0);
    }
}

/// Mean over maximum, in (0, 1]: 1 is perfect, and also the answer when there is no load.
pub fn balancedness(loads: &[u64]) -> f64 {
    match loads.iter().max() {
        None | Some(0) => 1.0,
        Some(&max) => sum(loads) / (max as f64 * loads.len() as f64),
    }
}

/// Maximum over mean, minus 1: 0 is perfect, and also the answer when there is no load.
pub fn imbalance_ratio(loads: &[u64]) -> f64 {
    1.0 / balancedness(loads) - 1.0
}

/// Share of all tokens that the most loaded expert receives; 0 without tokens.
pub fn max_share(counts: &[u64]) -> f64 {
    match counts.iter().max() {
        None | Some(0) => 0.0,
        Some(&max) => max as f64 / sum(counts),
    }
}

/// Shannon entropy of the experts' shares over its largest possible value, in [0, 1]: 1 is uniform routing, and also
/// the answer without tokens or with a single expert.
pub fn entropy_ratio(counts: &[u64]) -> f64 {
    let total = sum(counts);
    if total == 0.0 || counts.len() < 2 {
        return 1.0;
    }
    let shares = counts.iter().filter(|&&n| n > 0).map(|&n| n as f64 / total);
    let entropy: f64 = shares.map(|p| -p * p.ln()).sum();
    (entropy / (counts.len() as f64).ln()).clamp(0.0, 1.0)
}

/// Sums as float: 2^64 tokens on several experts do not overflow.
fn sum(counts: &[u64]) -> f64 {
    counts.iter().map(|&n| n as f64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_stay_apart_and_sum() {
        let mut load = LoadWindow::new(&[1, 2], 3);
        load.add(Phase::Prefill, 1, &[5, 0, 1]);
        load.add(Phase::Decode, 1, &[1, 2, 0]);
        load.add(Phase::Decode, 1, &[1, 0, 0]);
        assert_eq!(load.counts(Phase::Prefill, 1), [5, 0, 1]);
        assert_eq!(load.counts(Phase::Decode, 1), [2, 2, 0]);
        assert_eq!(load.counts(Phase::Decode, 0), [0, 0, 0]);
        assert_eq!(load.totals(1).collect::<Vec<_>>(), [7, 2, 1]);
        let mut earlier = LoadWindow::new(&[1, 2], 3);
        earlier.add(Phase::Decode, 1, &[1, 5, 0]);
        let since = load.since(&earlier);
        assert_eq!(
            (since.counts(Phase::Prefill, 1), since.counts(Phase::Decode, 1)),
            (&[5, 0, 1][..], &[1, 0, 0][..])
        );
        load.clear();
        assert_eq!(load, LoadWindow::new(&[1, 2], 3));
    }

    #[test]
    fn merging_sums_and_never_wraps() {
        let mut load = LoadWindow::new(&[0], 2);
        load.counts_mut(Phase::Decode, 0).copy_from_slice(&[u64::MAX - 1, 4]);
        let mut other = load.clone();
        other.add(Phase::Prefill, 0, &[7, 7]);
        load.merge(&other).unwrap();
        assert_eq!(load.counts(Phase::Decode, 0), [u64::MAX, 8]);
        assert_eq!(load.totals(0).collect::<Vec<_>>(), [u64::MAX, 15]);
    }

    #[test]
    fn merging_other_shapes_is_refused() {
        let mut load = LoadWindow::new(&[0, 1], 2);
        for other in [LoadWindow::new(&[0, 1], 3), LoadWindow::new(&[0, 2], 2)] {
            assert!(load.merge(&other).unwrap_err().to_string().contains("differ in shape"));
        }
    }

    #[test]
    fn ratios_of_known_loads() {
        assert_eq!(balancedness(&[2, 4]), 0.75);
        assert_eq!(imbalance_ratio(&[1, 2, 3]), 0.5);
        assert_eq!(max_share(&[1, 3]), 0.75);
        assert_eq!(entropy_ratio(&[5, 5, 5, 5]), 1.0);
        assert_eq!(entropy_ratio(&[5, 0]), 0.0);
        assert!((entropy_ratio(&[1, 1, 0, 0]) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn no_load_is_balanced() {
        for empty in [&[][..], &[0], &[0, 0]] {
            assert_eq!(balancedness(empty), 1.0);
            assert_eq!(imbalance_ratio(empty), 0.0);
            assert_eq!(max_share(empty), 0.0);
            assert_eq!(entropy_ratio(empty), 1.0);
        }
        assert_eq!(balancedness(&[u64::MAX, u64::MAX]), 1.0);
    }
}
