//! Counters of expert load. Each rank counts the tokens it *owns* and where it sends them, so that the sum over ranks
//! counts every routed token once; rows in flight, padding and replicas never count twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use router_sim::placement::Placement;

use super::in_force::InForce;
use crate::metrics::{LoadSnapshot, LoadSource, RankMeter};
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
    slots_per_rank: usize,
    /// `[layer]`: rows that this rank's own experts computed in the latest step.
    computed: Vec<AtomicU64>,
    /// `[layer][slot of this rank]`: rows that each of them computed since the start.
    by_slot: Vec<AtomicU64>,
    /// Time and traffic of the same rank.
    pub meter: Arc<RankMeter>,
}

impl LoadCounters {
    /// Zeroes for the layers, experts, ranks and slots of a placement.
    pub fn new(placement: &Placement) -> Self {
        let (layers, experts, ranks) = (placement.layers(), placement.experts(), placement.ranks());
        let slots_per_rank = placement.slots_per_rank();
        let zeroes = |n: usize| (0..n).map(|_| AtomicU64::new(0)).collect();
        LoadCounters {
            layers,
            experts,
            ranks,
            by_expert: zeroes(2 * layers * experts),
            by_rank: zeroes(2 * layers * ranks),
            slots_per_rank,
            computed: zeroes(layers),
            by_slot: zeroes(layers * slots_per_rank),
            meter: Arc::default(),
        }
    }

    /// One token of MoE layer `layer` (counted from 0) goes to `expert` on `rank`.
    pub fn count(&self, phase: Phase, layer: usize, expert: usize, rank: usize) {
        add_one(&self.by_expert[(phase as usize * self.layers + layer) * self.experts + expert]);
        add_one(&self.by_rank[(phase as usize * self.layers + layer) * self.ranks + rank]);
    }

    /// In this step, slot `s` of this rank computes rows `offsets[s]..offsets[s + 1]` of MoE layer `layer`.
    pub fn set_computed(&self, layer: usize, offsets: &[usize]) {
        assert_eq!(offsets.len(), self.slots_per_rank + 1, "rows of {} slots", self.slots_per_rank);
        self.computed[layer].store(offsets[self.slots_per_rank] as u64, Ordering::Relaxed);
        let slots = &self.by_slot[layer * self.slots_per_rank..];
        for (counter, bounds) in slots.iter().zip(offsets.windows(2)) {
            add(counter, (bounds[1] - bounds[0]) as u64);
        }
    }

    /// Rows of a layer that each slot of this rank computed since the start; `[slots_per_rank]`.
    pub fn slot_rows(&self, layer: usize) -> Vec<u64> {
        let slots = layer * self.slots_per_rank..(layer + 1) * self.slots_per_rank;
        self.by_slot[slots].iter().map(|counter| counter.load(Ordering::Relaxed)).collect()
    }

    /// Rows of a layer that this rank sent to each expert-parallel rank since the start, both phases; `[ranks]`.
    pub fn sent_rows(&self, layer: usize) -> Vec<u64> {
        let mut sent = vec![0; self.ranks];
        for phase in Phase::ALL {
            let first = (phase as usize * self.layers + layer) * self.ranks;
            add_all(&self.by_rank[first..first + self.ranks], &mut sent);
        }
        sent
    }

    /// Adds the rows that this rank sent to each expert-parallel rank since the start, over all layers; `[ranks]`.
    fn add_sent(&self, phase: Phase, sent: &mut [u64]) {
        let first = phase as usize * self.layers * self.ranks;
        let layers = &self.by_rank[first..first + self.layers * self.ranks];
        layers.chunks_exact(self.ranks).for_each(|layer| add_all(layer, sent));
    }
}

fn add_one(counter: &AtomicU64) {
    add(counter, 1);
}

/// A plain load and store: there is one writer, so no locked read-modify-write is needed.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed) + n, Ordering::Relaxed);
}

fn add_all(counters: &[AtomicU64], totals: &mut [u64]) {
    for (total, counter) in totals.iter_mut().zip(counters) {
        *total += counter.load(Ordering::Relaxed);
    }
}

/// The counters of all ranks: what the metrics page is filled from.
pub struct WorldLoad {
    /// Where the experts live.
    pub in_force: Arc<InForce>,
    /// One per rank of the world; at least one.
    pub counters: Vec<Arc<LoadCounters>>,
}

impl LoadSource for WorldLoad {
    fn snapshot(&self) -> LoadSnapshot {
        let LoadCounters { experts, ranks, .. } = *self.counters[0];
        let sum = LoadSnapshot::zeros(self.placement().layer_ids().to_vec(), experts, ranks);
        let mut sum = sum.with_sources(self.counters.len());
        for (source, counters) in self.counters.iter().enumerate() {
            add_all(&counters.by_expert, &mut sum.by_expert);
            add_all(&counters.by_rank, &mut sum.by_rank);
            for phase in Phase::ALL {
                let first = (phase as usize * self.counters.len() + source) * ranks;
                counters.add_sent(phase, &mut sum.sent[first..first + ranks]);
            }
        }
        sum
    }

    fn by_rank(&self) -> Vec<u64> {
        let mut sum = vec![0; self.counters[0].by_rank.len()];
        self.counters.iter().for_each(|counters| add_all(&counters.by_rank, &mut sum));
        sum
    }

    /// Ranks that share an expert compute the same rows, so the ratio is that of the expert-parallel ranks.
    fn step_imbalance(&self) -> f64 {
        let (mut max, mut all) = (0, 0);
        for layer in 0..self.counters[0].layers {
            let rows = self.counters.iter().map(|rank| rank.computed[layer].load(Ordering::Relaxed));
            max += rows.clone().max().unwrap_or(0);
            all += rows.sum::<u64>();
        }
        if all == 0 { 0.0 } else { (max * self.counters.len() as u64) as f64 / all as f64 - 1.0 }
    }

    fn placement(&self) -> Arc<Placement> {
        self.in_force.placement()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use router_sim::load::LoadWindow;
    use router_sim::placement::{ClusterShape, Linear, PlacementPolicy};

    #[test]
    fn the_imbalance_of_a_step_is_that_of_its_critical_path() {
        let shape = ClusterShape { ranks: 2, redundant: 0 };
        let placement = Arc::new(Linear.place(&LoadWindow::new(&[0, 1], 4), &shape).unwrap());
        let counters: Vec<_> = (0..2).map(|_| Arc::new(LoadCounters::new(&placement))).collect();
        let world = WorldLoad { in_force: Arc::new(InForce::new(placement)), counters };
        assert_eq!(world.step_imbalance(), 0.0, "no rows are balanced");
        // The busy rank is another in each layer, so an average over layers would hide it.
        for (layer, rows) in [(0, [6, 2]), (1, [2, 6])] {
            world.counters.iter().zip(rows).for_each(|(rank, rows)| rank.set_computed(layer, &[0, 1, rows]));
        }
        assert_eq!(world.step_imbalance(), 0.5);
        world.counters[0].set_computed(0, &[0, 3, 3]);
        assert_eq!(world.counters[0].slot_rows(0), [4, 5]);
        assert_eq!(world.counters[0].slot_rows(1), [1, 1]);
    }

    #[test]
    fn traffic_is_told_by_owner_and_destination() {
        let shape = ClusterShape { ranks: 2, redundant: 0 };
        let placement = Arc::new(Linear.place(&LoadWindow::new(&[0, 1], 4), &shape).unwrap());
        let counters: Vec<_> = (0..3).map(|_| Arc::new(LoadCounters::new(&placement))).collect();
        counters[2].count(Phase::Decode, 0, 3, 1);
        counters[2].count(Phase::Decode, 1, 0, 0);
        counters[2].count(Phase::Decode, 1, 2, 1);
        counters[0].count(Phase::Prefill, 1, 1, 0);
        let world = WorldLoad { in_force: Arc::new(InForce::new(placement)), counters };
        let load = world.snapshot();
        assert_eq!((load.sources, load.by_rank.clone()), (3, world.by_rank()));
        assert_eq!(load.sent_by(Phase::Decode, 2), [1, 2]);
        assert_eq!(load.sent_by(Phase::Prefill, 0), [1, 0]);
        assert_eq!(load.sent.iter().sum::<u64>(), 4);
    }
}
