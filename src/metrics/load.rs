//! The expert load of the whole world: a plain snapshot, and who can tell it.

use std::sync::Arc;

use router_sim::load::{LoadWindow, Phase};
use router_sim::placement::Placement;

/// Expert load of the whole world since start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadSnapshot {
    /// Absolute indices of the MoE layers, ascending.
    pub layer_ids: Vec<usize>,
    /// Logical experts per layer.
    pub experts: usize,
    /// Expert-parallel ranks.
    pub ranks: usize,
    /// Ranks of the world: those that own tokens and send them to experts.
    pub sources: usize,
    /// `[phase][layer][expert]`: tokens routed to each expert.
    pub by_expert: Vec<u64>,
    /// `[phase][layer][rank]`: the same tokens by the rank that computed them.
    pub by_rank: Vec<u64>,
    /// `[phase][source][rank]`: the same tokens by their owner and the rank that computed them, over all layers.
    pub sent: Vec<u64>,
}

impl LoadSnapshot {
    /// All counts zero, in a world of as many sources as expert-parallel ranks.
    pub fn zeros(layer_ids: Vec<usize>, experts: usize, ranks: usize) -> Self {
        let rows = Phase::ALL.len() * layer_ids.len();
        LoadSnapshot {
            layer_ids,
            experts,
            ranks,
            sources: ranks,
            by_expert: vec![0; rows * experts],
            by_rank: vec![0; rows * ranks],
            sent: vec![0; Phase::ALL.len() * ranks * ranks],
        }
    }

    /// The same in a world of `sources` ranks.
    pub fn with_sources(mut self, sources: usize) -> Self {
        self.sources = sources;
        self.sent = vec![0; Phase::ALL.len() * sources * self.ranks];
        self
    }

    /// Tokens of each expert in MoE layer number `layer` (an index into [`Self::layer_ids`]).
    pub fn experts_of(&self, phase: Phase, layer: usize) -> &[u64] {
        let first = (phase as usize * self.layer_ids.len() + layer) * self.experts;
        &self.by_expert[first..first + self.experts]
    }

    /// The tokens of the experts as placements are planned on.
    pub fn to_window(&self) -> LoadWindow {
        let mut window = LoadWindow::new(&self.layer_ids, self.experts);
        for phase in Phase::ALL {
            for layer in 0..self.layer_ids.len() {
                window.counts_mut(phase, layer).copy_from_slice(self.experts_of(phase, layer));
            }
        }
        window
    }

    /// Tokens of each rank in MoE layer number `layer`.
    pub fn ranks_of(&self, phase: Phase, layer: usize) -> &[u64] {
        let first = (phase as usize * self.layer_ids.len() + layer) * self.ranks;
        &self.by_rank[first..first + self.ranks]
    }

    /// Tokens that a rank of the world owned, by the rank that computed them, over all layers.
    pub fn sent_by(&self, phase: Phase, source: usize) -> &[u64] {
        let first = (phase as usize * self.sources + source) * self.ranks;
        &self.sent[first..first + self.ranks]
    }

    /// Tokens of each expert of a layer, both phases.
    pub fn layer_experts(&self, layer: usize) -> Vec<u64> {
        let [prefill, decode] = Phase::ALL.map(|phase| self.experts_of(phase, layer));
        prefill.iter().zip(decode).map(|(a, b)| a + b).collect()
    }

    /// Tokens of each rank of a layer, both phases.
    pub fn layer_ranks(&self, layer: usize) -> Vec<u64> {
        let [prefill, decode] = Phase::ALL.map(|phase| self.ranks_of(phase, layer));
        prefill.iter().zip(decode).map(|(a, b)| a + b).collect()
    }

    /// Tokens of a rank over all layers.
    pub fn rank_total(&self, rank: usize, phase: Phase) -> u64 {
        (0..self.layer_ids.len()).map(|layer| self.ranks_of(phase, layer)[rank]).sum()
    }

    /// What was added since `earlier`, a snapshot of the same world. A count that went back counts as 0.
    pub fn since(&self, earlier: &LoadSnapshot) -> LoadSnapshot {
        let shape = |s: &LoadSnapshot| (s.layer_ids.len(), s.experts, s.ranks, s.sources);
        assert_eq!(shape(self), shape(earlier), "layers, experts, ranks and sources of two snapshots");
        let minus =
            |now: &[u64], then: &[u64]| now.iter().zip(then).map(|(n, t)| n.saturating_sub(*t)).collect();
        LoadSnapshot {
            by_expert: minus(&self.by_expert, &earlier.by_expert),
            by_rank: minus(&self.by_rank, &earlier.by_rank),
            sent: minus(&self.sent, &earlier.sent),
            layer_ids: self.layer_ids.clone(),
            ..*self
        }
    }
}

/// Who can tell the expert load: the MoE layers in a running server, a table in tests.
pub trait LoadSource: Send + Sync {
    /// Counts since start. Shape and order never change while the process lives; counts never go back. Called about
    /// once a second from a thread that runs no model.
    fn snapshot(&self) -> LoadSnapshot;

    /// [`LoadSnapshot::by_rank`] alone, once a second.
    fn by_rank(&self) -> Vec<u64> {
        self.snapshot().by_rank
    }

    /// Imbalance ratio of the latest step: expert rows of the busiest rank over the mean, each summed over layers,
    /// minus 1. Called between two steps from the engine's thread.
    fn step_imbalance(&self) -> f64;

    /// Where the experts live now.
    fn placement(&self) -> Arc<Placement>;
}

/// Index of the highest load, the lowest among equals; 0 for an empty slice.
pub fn hottest(loads: &[u64]) -> usize {
    loads.iter().enumerate().fold(0, |best, (i, &load)| if load > loads[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_ranks() -> LoadSnapshot {
        let mut load = LoadSnapshot::zeros(vec![1, 3], 3, 2);
        load.by_expert = vec![1, 2, 3, 4, 5, 6, 10, 20, 30, 40, 50, 60];
        load.by_rank = vec![3, 3, 4, 11, 30, 30, 40, 110];
        load
    }

    #[test]
    fn rows_are_found() {
        let load = two_ranks();
        assert_eq!(load.experts_of(Phase::Decode, 1), [40, 50, 60]);
        assert_eq!(load.ranks_of(Phase::Prefill, 1), [4, 11]);
        assert_eq!(load.layer_experts(0), [11, 22, 33]);
        assert_eq!(load.layer_ranks(1), [44, 121]);
        assert_eq!(load.rank_total(0, Phase::Decode), 70);
        let mut load = load.with_sources(3);
        load.sent = (0..12).collect();
        assert_eq!(load.sent_by(Phase::Prefill, 2), [4, 5]);
        assert_eq!(load.sent_by(Phase::Decode, 0), [6, 7]);
    }

    #[test]
    fn a_window_is_the_difference_of_two_snapshots() {
        let then = two_ranks();
        let mut now = two_ranks();
        now.by_expert[2] += 7;
        now.by_rank[1] += 7;
        now.sent[1] += 7;
        let window = now.since(&then);
        assert_eq!(
            (window.sent_by(Phase::Prefill, 0), window.sent_by(Phase::Decode, 0)),
            (&[0, 7][..], &[0, 0][..])
        );
        assert_eq!(window.rank_total(1, Phase::Prefill), 7);
        assert_eq!(window.rank_total(0, Phase::Prefill), 0);
        assert_eq!(window.layer_experts(0), [0, 0, 7]);
    }

    #[test]
    fn the_hottest_expert_is_the_first_of_equals() {
        for (loads, hot) in [(&[0, 8, 0][..], 1), (&[1, 3, 3][..], 1), (&[0, 0][..], 0), (&[][..], 0)] {
            assert_eq!(hottest(loads), hot, "{loads:?}");
        }
    }
}
