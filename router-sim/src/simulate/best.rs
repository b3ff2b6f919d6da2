//! How low the most loaded rank could be in one layer of one step.

use crate::bounds::replica_bound;
use crate::placement::LayerPlacement;
use crate::split::{Shares, Split};

/// Finds the best split of a placement, and the bound over all placements. Buffers are reused.
#[derive(Debug, Clone, Default)]
pub(super) struct BestSplit {
    shares: Shares,
}

impl BestSplit {
    /// Rows of the most loaded rank under the best split of this placement, and under the best placement with as many
    /// slots (no placement and no split gets below that). `tokens` is `[experts]`, `actual` what the rank got, which bounds
    /// both.
    pub fn of(&mut self, layer: LayerPlacement<'_>, tokens: &[u64], actual: u64) -> (u64, u64) {
        // Rows are whole; the bound is for divisible ones.
        let bound = (replica_bound(tokens, layer.ranks(), layer.slots().len()) - 1e-6).ceil() as u64;
        if actual <= bound {
            return (actual, actual);
        }
        let best = self.max_rows(layer, tokens);
        (best, bound.min(best))
    }

    /// Rows of the most loaded rank under the best split of a placement.
    pub fn max_rows(&mut self, layer: LayerPlacement<'_>, tokens: &[u64]) -> u64 {
        let shares = self.shares.share(Split::Exact, layer, tokens).expect("a batch's rows fit");
        let per_rank = shares.chunks_exact(layer.slots_per_rank()).map(|slots| slots.iter().sum::<u64>());
        per_rank.max().unwrap_or(0)
    }
}
