//! Split: how the tokens of one expert are shared out among its replicas.
//!
//! A split is integer quotas per (source rank, slot), computed from every rank's counts: a pure function, so all
//! ranks that see the same counts decide alike without a word. A source rank then deals its rows of an expert to the
//! expert's slots in canonical order, rows ascending and k ascending within a row: the lowest slot first, until its
//! quota is used up, then the next.

use std::ops::Range;

use crate::load::{LoadWindow, balancedness};
use crate::placement::{LayerPlacement, Placement};

/// How quotas are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Split {
    /// Every replica of an expert gets the same number of tokens; lower slots get the remainder, one token each. The
    /// expert's tokens in canonical order (source rank, row, k) are cut into contiguous runs, so that few (source rank,
    /// slot) pairs exchange rows.
    #[default]
    Even,
}

impl Split {
    /// Fills `quotas` `[sources][slots]`, all zero before, from `counts` `[sources][experts]`.
    fn fill(self, layer: LayerPlacement<'_>, counts: &[u32], quotas: &mut [u32]) {
        match self {
            Split::Even => (0..layer.experts()).for_each(|expert| even(layer, expert, counts, quotas)),
        }
    }
}

/// Cuts one expert's tokens, numbered in canonical order, into a run per slot and gives each source rank the part of
/// the run that it holds.
fn even(layer: LayerPlacement<'_>, expert: usize, counts: &[u32], quotas: &mut [u32]) {
    let (experts, slots) = (layer.experts(), layer.slots().len());
    let replicas = layer.replicas(expert);
    let total: u64 = counts.iter().skip(expert).step_by(experts).map(|&n| u64::from(n)).sum();
    let mut replica = 0;
    let mut room = even_share(total, replicas.len(), replica);
    for (source, &count) in counts.iter().skip(expert).step_by(experts).enumerate() {
        let mut left = u64::from(count);
        while left > 0 {
            if room == 0 {
                replica += 1;
                room = even_share(total, replicas.len(), replica);
                continue;
            }
            let run = left.min(room);
            // A run is part of one source's count, so it fits.
            quotas[source * slots + replicas[replica] as usize] += run as u32;
            (left, room) = (left - run, room - run);
        }
    }
}

/// Tokens of the given one of `replicas` when `total` are shared out evenly.
fn even_share(total: u64, replicas: usize, replica: usize) -> u64 {
    let replicas = replicas as u64;
    total / replicas + u64::from((replica as u64) < total % replicas)
}

/// One layer's split in one step, and the cursor of a source rank that deals its rows. Made once and rebuilt for every
/// layer of every step: it allocates only until its buffers are large enough.
#[derive(Debug, Clone, Default)]
pub struct SplitPlan {
    split: Split,
    slots: usize,
    slots_per_rank: usize,
    /// `[sources][slots]`
    quotas: Vec<u32>,
    /// `[experts + 1]`: where each expert's slots begin in `replicas`.
    starts: Vec<u32>,
    /// Slots, grouped by expert, ascending within one.
    replicas: Vec<u32>,
    /// `[experts]`: the replica that is being dealt to, as an index into `replicas`.
    cursor: Vec<u32>,
    /// `[slots]`: what is left of the dealing source's quotas.
    left: Vec<u32>,
}

impl SplitPlan {
    /// An empty plan of the given kind.
    pub fn new(split: Split) -> Self {
        SplitPlan { split, ..SplitPlan::default() }
    }

    /// Computes the quotas of one layer. `counts` is `[sources][experts]`: the tokens that each source rank routed to
    /// each expert.
    ///
    /// # Panics
    /// When `counts` is not a whole number of rows.
    pub fn rebuild(&mut self, layer: LayerPlacement<'_>, counts: &[u32]) {
        let experts = layer.experts();
        assert!(counts.len().is_multiple_of(experts), "{} counts for {experts} experts", counts.len());
        self.slots = layer.slots().len();
        self.slots_per_rank = layer.slots_per_rank();
        self.quotas.clear();
        self.quotas.resize(counts.len() / experts * self.slots, 0);
        self.split.fill(layer, counts, &mut self.quotas);
        self.starts.clear();
        self.starts.push(0);
        self.replicas.clear();
        for expert in 0..experts {
            self.replicas.extend_from_slice(layer.replicas(expert));
            self.starts.push(self.replicas.len() as u32);
        }
    }

    /// Source ranks.
    pub fn sources(&self) -> usize {
        self.quotas.len().checked_div(self.slots).unwrap_or(0)
    }

    /// Rows that a source rank sends to each slot, rank-major; `[slots]`.
    pub fn quotas(&self, source: usize) -> &[u32] {
        &self.quotas[source * self.slots..(source + 1) * self.slots]
    }

    /// Rows that a source rank sends to each slot of a destination rank; `[slots_per_rank]`.
    pub fn quotas_to(&self, source: usize, rank: usize) -> &[u32] {
        let on_rank: Range<usize> = rank * self.slots_per_rank..(rank + 1) * self.slots_per_rank;
        &self.quotas(source)[on_rank]
    }

    /// Starts dealing a source rank's rows; [`SplitPlan::next_slot`] is then called for its rows in canonical order.
    pub fn deal(&mut self, source: usize) {
        self.left.clear();
        self.left.extend_from_slice(&self.quotas[source * self.slots..(source + 1) * self.slots]);
        self.cursor.clear();
        self.cursor.extend_from_slice(&self.starts[..self.starts.len() - 1]);
    }

    /// The slot of the dealing source's next row of this expert.
    ///
    /// # Panics
    /// When more rows are dealt than were counted.
    pub fn next_slot(&mut self, expert: usize) -> usize {
        let end = self.starts[expert + 1];
        let cursor = &mut self.cursor[expert];
        while *cursor < end {
            let slot = self.replicas[*cursor as usize] as usize;
            if self.left[slot] > 0 {
                self.left[slot] -= 1;
                return slot;
            }
            *cursor += 1;
        }
        panic!("expert {expert} was dealt more rows than this source rank counted");
    }
}

/// Tokens that each rank receives when a layer's counts `[experts]` are shared out evenly; `[ranks]`.
pub fn even_rank_loads(layer: LayerPlacement<'_>, counts: &[u64]) -> Vec<u64> {
    assert_eq!(counts.len(), layer.experts(), "one count per expert");
    let mut loads = vec![0u64; layer.ranks()];
    for (expert, &count) in counts.iter().enumerate() {
        let replicas = layer.replicas(expert);
        for (i, &slot) in replicas.iter().enumerate() {
            let load = &mut loads[layer.rank_of(slot as usize)];
            *load = load.saturating_add(even_share(count, replicas.len(), i));
        }
    }
    loads
}

/// Balancedness of each layer when a window's tokens, both phases together, are shared out evenly; `[layers]`.
///
/// # Panics
/// When the placement is for other layers or experts.
pub fn even_balancedness(load: &LoadWindow, placement: &Placement) -> Vec<f64> {
    assert_eq!(load.layer_ids(), placement.layer_ids(), "one window layer per placement layer");
    let of_layer = |l| {
        let counts: Vec<u64> = load.totals(l).collect();
        balancedness(&even_rank_loads(placement.layer(l), &counts))
    };
    (0..placement.layers()).map(of_layer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Phase;
    use proptest::prelude::*;

    fn placement(ranks: usize, experts: usize, slots: Vec<i32>) -> Placement {
        Placement::new(ranks, slots.len() / ranks, experts, vec![0], vec![slots]).unwrap()
    }

    #[test]
    fn tokens_are_cut_into_contiguous_runs() {
        // Expert 0 on slots 0 and 3, 5 tokens from source 0 and 2 from source 1: runs of 4 and 3.
        let placement = placement(2, 2, vec![0, 1, -1, 0]);
        let mut plan = SplitPlan::new(Split::Even);
        plan.rebuild(placement.layer(0), &[5, 1, 2, 0]);
        assert_eq!(plan.quotas(0), [4, 1, 0, 1]);
        assert_eq!(plan.quotas(1), [0, 0, 0, 2]);
        assert_eq!(plan.quotas_to(0, 1), [0, 1]);
        plan.deal(0);
        let dealt: Vec<usize> = [0, 0, 1, 0, 0, 0].iter().map(|&e| plan.next_slot(e)).collect();
        assert_eq!(dealt, [0, 0, 1, 0, 0, 3]);
    }

    #[test]
    fn idle_sources_and_idle_layers() {
        let placement = placement(1, 1, vec![0]);
        let mut plan = SplitPlan::new(Split::Even);
        for counts in [&[][..], &[0], &[0, 0, 0]] {
            plan.rebuild(placement.layer(0), counts);
            assert_eq!(plan.sources(), counts.len());
            assert!((0..plan.sources()).all(|s| plan.quotas(s) == [0]));
        }
    }

    #[test]
    #[should_panic(expected = "expert 0 was dealt more rows")]
    fn dealing_more_than_counted_is_a_bug() {
        let placement = placement(1, 1, vec![0]);
        let mut plan = SplitPlan::new(Split::Even);
        plan.rebuild(placement.layer(0), &[1]);
        plan.deal(0);
        plan.next_slot(0);
        plan.next_slot(0);
    }

    #[test]
    fn huge_counts_do_not_overflow() {
        let placement = placement(2, 1, vec![0, 0]);
        let mut plan = SplitPlan::new(Split::Even);
        plan.rebuild(placement.layer(0), &[u32::MAX, u32::MAX, u32::MAX]);
        assert_eq!(plan.quotas(0), [u32::MAX, 0]);
        assert_eq!(plan.quotas(1), [u32::MAX / 2 + 1, u32::MAX / 2]);
        assert_eq!(plan.quotas(2), [0, u32::MAX]);
    }

    #[test]
    fn balancedness_of_a_window() {
        let placement = placement(2, 3, vec![0, 1, 0, 2]);
        let mut load = LoadWindow::new(&[0], 3);
        assert_eq!(even_balancedness(&load, &placement), [1.0]);
        load.add(Phase::Prefill, 0, &[4, 3, 0]);
        load.add(Phase::Decode, 0, &[0, 0, 1]);
        assert_eq!(even_rank_loads(placement.layer(0), &[4, 3, 1]), [5, 3]);
        assert_eq!(even_balancedness(&load, &placement), [0.8]);
    }

    /// A layer where every expert has a slot and the others hold anything, and counts of up to 5 sources.
    fn cases() -> impl Strategy<Value = (Placement, Vec<u32>)> {
        (1usize..6, 1usize..9, 0usize..12, 0usize..5).prop_flat_map(|(ranks, experts, extra, sources)| {
            let width = (experts + extra).next_multiple_of(ranks);
            let filling = prop::collection::vec(-1..experts as i32, width - experts);
            let slots =
                filling.prop_map(move |more| (0..experts as i32).chain(more).collect()).prop_shuffle();
            let count = prop_oneof![Just(0u32), 0u32..40];
            let counts = prop::collection::vec(count, sources * experts);
            (slots.prop_map(move |s: Vec<i32>| placement(ranks, experts, s)), counts)
        })
    }

    proptest! {
        #[test]
        fn every_token_has_one_slot_of_its_expert((placement, counts) in cases()) {
            let layer = placement.layer(0);
            let experts = layer.experts();
            let mut plan = SplitPlan::new(Split::Even);
            // A reused plan and a fresh one agree.
            plan.rebuild(layer, &vec![3; 7 * experts]);
            plan.deal(6);
            plan.rebuild(layer, &counts);
            let mut fresh = SplitPlan::new(Split::Even);
            fresh.rebuild(layer, &counts);
            prop_assert_eq!(plan.sources(), counts.len() / experts);
            let mut per_slot = vec![0u64; placement.slots()];
            for (source, counts) in counts.chunks(experts).enumerate() {
                prop_assert_eq!(plan.quotas(source), fresh.quotas(source));
                for (expert, &count) in counts.iter().enumerate() {
                    let sent: u32 = layer.replicas(expert).iter().map(|s| plan.quotas(source)[*s as usize]).sum();
                    prop_assert_eq!(sent, count);
                }
                prop_assert_eq!(plan.quotas(source).iter().sum::<u32>(), counts.iter().sum::<u32>());
                let mut dealt = vec![0; placement.slots()];
                let mut last = vec![0; experts];
                plan.deal(source);
                for (expert, &rows) in counts.iter().enumerate().rev() {
                    for _ in 0..rows {
                        let slot = plan.next_slot(expert);
                        prop_assert_eq!(layer.expert_of(slot), Some(expert));
                        prop_assert!(slot >= last[expert]);
                        last[expert] = slot;
                        dealt[slot] += 1;
                    }
                }
                prop_assert_eq!(&dealt[..], plan.quotas(source));
                for (sum, n) in per_slot.iter_mut().zip(dealt) {
                    *sum += u64::from(n);
                }
            }
            for expert in 0..experts {
                let loads: Vec<u64> = layer.replicas(expert).iter().map(|s| per_slot[*s as usize]).collect();
                prop_assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1, "{:?}", loads);
            }
            let totals: Vec<u64> = (0..experts)
                .map(|e| counts.iter().skip(e).step_by(experts).map(|n| u64::from(*n)).sum())
                .collect();
            let per_rank: Vec<u64> = per_slot.chunks(placement.slots_per_rank()).map(|s| s.iter().sum()).collect();
            prop_assert_eq!(even_rank_loads(layer, &totals), per_rank);
        }
    }
}
