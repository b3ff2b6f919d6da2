//! Counters of expert load. Each rank counts the tokens it *owns* and where it sends them, so that the sum over ranks
//! counts every routed token once; rows in flight, padding and replicas never count twice.

use std::sync::atomic::{AtomicU64, Ordering};

pub use router_sim::load::Phase;

/// Tokens routed by one rank since it started. Written by that rank alone, read by anyone.
pub struct LoadCounters {
    layers: usize,
    experts: usize,
    ranks: usize,
    /// `[phase][layer][expert]`
    by_expert: Vec<AtomicU64>,
    /// `[phase][layer][expert-parallel rank]`
    by_rank: Vec<AtomicU64>,
}

impl LoadCounters {
    /// Zeroes for `layers` MoE layers of `experts` experts over `ranks` expert-parallel ranks.
    pub fn new(layers: usize, experts: usize, ranks: usize) -> Self {
        let zeroes = |n: usize| (0..n).map(|_| AtomicU64::new(0)).collect();
        LoadCounters {
            layers,
            experts,
            ranks,
            by_expert: zeroes(2 * layers * experts),
            by_rank: zeroes(2 * layers * ranks),
        }
    }

    /// One token of MoE layer `layer` (counted from 0) goes to `expert` on `rank`.
    pub fn count(&self, phase: Phase, layer: usize, expert: usize, rank: usize) {
        add_one(&self.by_expert[(phase as usize * self.layers + layer) * self.experts + expert]);
        add_one(&self.by_rank[(phase as usize * self.layers + layer) * self.ranks + rank]);
    }

    /// Adds tokens per expert of one layer and phase into `totals` `[experts]`.
    pub fn add_experts(&self, phase: Phase, layer: usize, totals: &mut [u64]) {
        add_range(&self.by_expert, (phase as usize * self.layers + layer) * self.experts, totals);
    }

    /// Adds tokens per expert-parallel rank of one layer and phase into `totals` `[ranks]`.
    pub fn add_ranks(&self, phase: Phase, layer: usize, totals: &mut [u64]) {
        add_range(&self.by_rank, (phase as usize * self.layers + layer) * self.ranks, totals);
    }
}

/// A plain load and store: there is one writer, so no locked read-modify-write is needed.
fn add_one(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

fn add_range(counters: &[AtomicU64], start: usize, totals: &mut [u64]) {
    for (total, counter) in totals.iter_mut().zip(&counters[start..]) {
        *total += counter.load(Ordering::Relaxed);
    }
}

/// The counters of all ranks, as the metrics page reads them.
pub struct WorldLoad {
    /// Absolute indices of the MoE layers.
    pub layer_ids: Vec<usize>,
    /// One per rank of the world.
    pub counters: Vec<std::sync::Arc<LoadCounters>>,
}
