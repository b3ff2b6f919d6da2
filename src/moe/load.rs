//! Counters of expert load. Each rank counts the tokens it *owns* and where it sends them, so that the sum over ranks
//! counts every routed token once; rows in flight, padding and replicas never count twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::metrics::{LoadSnapshot, LoadSource};
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
}

/// A plain load and store: there is one writer, so no locked read-modify-write is needed.
fn add_one(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

fn add_all(counters: &[AtomicU64], totals: &mut [u64]) {
    for (total, counter) in totals.iter_mut().zip(counters) {
        *total += counter.load(Ordering::Relaxed);
    }
}

/// The counters of all ranks: what the metrics page is filled from.
pub struct WorldLoad {
    /// Absolute indices of the MoE layers.
    pub layer_ids: Vec<usize>,
    /// One per rank of the world; at least one.
    pub counters: Vec<Arc<LoadCounters>>,
}

impl LoadSource for WorldLoad {
    fn snapshot(&self) -> LoadSnapshot {
        let LoadCounters { experts, ranks, .. } = *self.counters[0];
        let mut sum = LoadSnapshot::zeros(self.layer_ids.clone(), experts, ranks);
        for counters in &self.counters {
            add_all(&counters.by_expert, &mut sum.by_expert);
            add_all(&counters.by_rank, &mut sum.by_rank);
        }
        sum
    }
}
