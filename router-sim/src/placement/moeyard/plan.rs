//! One layer: planned afresh, or changed from what is there.

use super::exchange::Exchange;
use super::layout::{Layout, NONE};
use super::refine::{Limits, refine};
use super::scenes::Scenes;
use super::{Moeyard, align, build};
use crate::bounds;
use crate::placement::LayerPlacement;
use crate::placement::eplb::{Eplb, Packer};

/// Layers with at most this many slots have time for the whole search where exchanges miss the bound.
const SMALL: usize = 160;
/// Largest loads of a copy that are tried, relative to the mean rank load, where the fewest tokens per copy do not lead to
/// balance: very hot experts then take slots that others need more.
const COPY_LOADS: [f64; 7] = [0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5];
/// Other numbers of copies are tried where the bound is missed by more than this many gaps.
const FAR: f64 = 10.0;
/// Trades per slot before exchanges give up.
const TRADES_PER_SLOT: usize = 10;

/// What is planned for, in every layer.
pub struct Task<'a> {
    pub policy: &'a Moeyard,
    pub ranks: usize,
    pub slots_per_rank: usize,
}

impl Task<'_> {
    /// A layer afresh; slots `[ranks * slots_per_rank]`.
    pub fn plan(&self, scenes: &Scenes) -> Vec<u32> {
        if self.policy.keeps_groups() {
            return self.plan_nodes(scenes);
        }
        let active = self.active();
        let planned = self.plan_whole(scenes, active.len());
        let mut slots = vec![NONE; self.ranks * self.slots_per_rank];
        for (held, rank) in planned.chunks(self.slots_per_rank).zip(active) {
            slots[rank * self.slots_per_rank..(rank + 1) * self.slots_per_rank].copy_from_slice(held);
        }
        slots
    }

    fn active(&self) -> Vec<usize> {
        (0..self.ranks).filter(|rank| !self.policy.failed_ranks.contains(rank)).collect()
    }

    /// Groups onto nodes by the best partition, then each node by itself.
    fn plan_nodes(&self, scenes: &Scenes) -> Vec<u32> {
        let Moeyard { groups, nodes, .. } = *self.policy;
        let totals = scenes.totals();
        let size = totals.len() / groups;
        let sums: Vec<f64> = totals.chunks(size).map(|g| g.iter().sum()).collect();
        let node_of = bounds::partition_groups(&sums, nodes);
        let mut slots = Vec::with_capacity(self.ranks * self.slots_per_rank);
        for node in 0..nodes {
            let own = (0..groups).filter(|g| node_of[*g] == node);
            let members: Vec<u32> = own.flat_map(|g| g * size..(g + 1) * size).map(|e| e as u32).collect();
            let planned = self.plan_whole(&scenes.of_experts(&members), self.ranks / nodes);
            slots.extend(planned.into_iter().map(|e| if e == NONE { NONE } else { members[e as usize] }));
        }
        slots
    }

    /// A layer on `ranks` ranks that are all alike.
    fn plan_whole(&self, scenes: &Scenes, ranks: usize) -> Vec<u32> {
        let slots = ranks * self.slots_per_rank;
        let bound = lower_bound(scenes, ranks, slots);
        let target = bound * (1.0 + self.policy.gap);
        let sum = scenes.sum();
        let copies = bounds::fewest_per_copy(&sum.weights, ranks, slots);
        let mut best = self.level(&sum, scenes, copies.clone(), ranks, true, target);
        if best.cost() > target {
            best = cheaper(best, self.level(&sum, scenes, copies, ranks, false, target));
        }
        for part in COPY_LOADS {
            if best.cost() > bound * (1.0 + FAR * self.policy.gap)
                && let Some(copies) = copies_of_at_most(&sum.weights, part / ranks as f64, ranks, slots)
            {
                best = cheaper(best, self.level(&sum, scenes, copies, ranks, false, target));
            }
        }
        if best.cost() > target && (slots <= SMALL || scenes.count > 1) {
            best = refine(&best, &Limits { origin: None, allowed: &[], transfers: usize::MAX, bound });
        }
        if best.cost() > target {
            let published = published(scenes, ranks, self.slots_per_rank);
            if cost_of(scenes, &published, ranks) < best.cost() * (1.0 - 1e-12) {
                return published;
            }
        }
        best.slots
    }

    /// Builds a layout for all scenes together and levels it by exchanges.
    fn level(
        &self,
        sum: &Scenes,
        scenes: &Scenes,
        copies: Vec<u32>,
        ranks: usize,
        web: bool,
        target: f64,
    ) -> Layout {
        let trades = TRADES_PER_SLOT * ranks * self.slots_per_rank;
        let mut layout = Layout::new(sum, copies, ranks, self.slots_per_rank);
        build::fill(&mut layout, web);
        // Within kinds first, so that the web of copies stays as it was spun.
        for within_kinds in [true, false] {
            if layout.cost() > target {
                Exchange::new(&mut layout, within_kinds).level(target, trades);
            }
        }
        if scenes.count == 1 { layout } else { layout.with_scenes(scenes) }
    }

    /// A layer changed from the current one by at most `limit` transfers.
    ///
    /// # Errors
    /// When experts that live on failed ranks only are more than that, in words.
    pub fn change(
        &self,
        scenes: &Scenes,
        current: LayerPlacement<'_>,
        limit: usize,
    ) -> Result<Vec<u32>, String> {
        let failed = &self.policy.failed_ranks;
        let usable = |slot: usize| !failed.contains(&(slot / self.slots_per_rank));
        // Of an expert's copies on one rank, the first counts.
        let mut held = vec![NONE; self.ranks * self.slots_per_rank];
        for (slot, &expert) in
            current.slots().iter().enumerate().filter(|(slot, e)| **e >= 0 && usable(*slot))
        {
            let rank = slot / self.slots_per_rank * self.slots_per_rank;
            if !held[rank..slot].contains(&(expert as u32)) {
                held[slot] = expert as u32;
            }
        }
        let mut copies = vec![0u32; scenes.experts()];
        held.iter().filter(|e| **e != NONE).for_each(|e| copies[*e as usize] += 1);
        let lost: Vec<u32> = (0..copies.len() as u32).filter(|e| copies[*e as usize] == 0).collect();
        if lost.len() > limit {
            return Err(format!(
                "{} experts live on failed ranks only, more than the limit of {limit} transfers",
                lost.len()
            ));
        }
        lost.iter().for_each(|e| copies[*e as usize] = 1);
        let mut origin = Layout::new(scenes, copies, self.ranks, self.slots_per_rank);
        (0..held.len()).filter(|slot| held[*slot] != NONE).for_each(|slot| origin.put(slot, held[slot]));
        let mut start = origin.clone();
        for &expert in &lost {
            build::bring_back(&mut start, expert, &usable);
        }
        let allowed: Vec<bool> = (0..self.ranks).map(|rank| !failed.contains(&rank)).collect();
        let active = allowed.iter().filter(|allowed| **allowed).count();
        let bound = lower_bound(scenes, active, active * self.slots_per_rank);
        let transfers = limit - lost.len();
        let best = refine(&start, &Limits { origin: Some(&origin), allowed: &allowed, transfers, bound });
        Ok(align::keep_all_slots(&best.slots, current))
    }
}

/// Copies of at most `largest` load each, as few as that takes; then second copies of the heaviest experts that have one,
/// while there are slots. `None` when the slots do not suffice.
fn copies_of_at_most(loads: &[f64], largest: f64, ranks: usize, slots: usize) -> Option<Vec<u32>> {
    let needed = |load: &f64| ((load / largest).ceil() as u32).clamp(1, ranks as u32);
    let mut copies: Vec<u32> = loads.iter().map(needed).collect();
    let left = slots.checked_sub(copies.iter().sum::<u32>() as usize)?;
    let mut single: Vec<usize> = (0..loads.len()).filter(|e| copies[*e] == 1 && ranks > 1).collect();
    single.sort_unstable_by(|a, b| loads[*b].total_cmp(&loads[*a]).then(a.cmp(b)));
    single.iter().take(left).for_each(|e| copies[*e] = 2);
    Some(copies)
}

/// No placement costs less: the sum of each scene's own bound.
fn lower_bound(scenes: &Scenes, ranks: usize, slots: usize) -> f64 {
    (0..scenes.count).map(|scene| bounds::replica_bound_of(&scenes.scene(scene), ranks, slots)).sum()
}

fn cheaper(a: Layout, b: Layout) -> Layout {
    if b.cost() < a.cost() { b } else { a }
}

/// What EPLB's global policy does with all scenes together. It is told tokens: parts of 1, rounded to its float32, tie
/// where tokens do not, and its choice would be another one, perhaps a worse.
fn published(scenes: &Scenes, ranks: usize, slots_per_rank: usize) -> Vec<u32> {
    let weights: Vec<f32> = scenes.totals().iter().map(|w| (*w * scenes.unit) as f32).collect();
    let mut map = vec![0; ranks * slots_per_rank];
    Packer::default().place_layer(&weights, Eplb::GLOBAL, ranks, &mut map);
    map.into_iter().map(|e| e as u32).collect()
}

/// Cost of any map, also one with two copies of an expert on a rank.
fn cost_of(scenes: &Scenes, slots: &[u32], ranks: usize) -> f64 {
    let mut copies = vec![0u32; scenes.experts()];
    slots.iter().for_each(|e| copies[*e as usize] += 1);
    let load = |held: &[u32], t: usize| -> f64 {
        held.iter()
            .map(|e| scenes.weights[*e as usize * scenes.count + t] / f64::from(copies[*e as usize]))
            .sum()
    };
    let ranks = slots.chunks(slots.len() / ranks);
    (0..scenes.count).map(|t| ranks.clone().map(|held| load(held, t)).fold(0.0, f64::max)).sum()
}
