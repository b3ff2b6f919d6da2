//! A given layout made better by few changes: exchanges of two slots and replacement of spare copies, at most so many
//! transfers of weights.
//!
//! The search aims at a level: the changes it makes lower the sum of what ranks carry above that level, most per transfer
//! first, always at the rank that is highest. A level that cannot be reached with the transfers at hand leaves some ranks
//! high, one that is reached easily leaves transfers unused; so levels are tried by bisection and the best outcome kept.

use super::layout::{Layout, NONE};

/// Levels tried.
const LEVELS: usize = 8;
/// Changes that gain less than this part of the bound are not worth their search.
const LEAST_GAIN: f64 = 2e-5;
/// More transfers than any layer can need, and far from overflow.
const UNLIMITED: usize = 1 << 30;
/// The search ends when the cost is known to this part of the bound.
const PRECISION: f64 = 1e-4;

/// What may change, and from where it is counted.
pub struct Limits<'a> {
    /// Where experts are now: what a rank holds here costs no transfer.
    pub origin: Option<&'a Layout>,
    /// Most transfers.
    pub transfers: usize,
    /// `[ranks]`, or empty for all: ranks that may hold experts.
    pub allowed: &'a [bool],
    /// No cost below this can be reached.
    pub bound: f64,
}

/// A change, and what it is worth.
#[derive(Debug, Clone, Copy)]
struct Change {
    gain: f64,
    cost: isize,
    kind: Kind,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Swap { a: usize, b: usize },
    Replace { slot: usize, expert: u32 },
}

/// The best layout found from `start`. Its cost is never higher.
pub fn refine(start: &Layout, limits: &Limits<'_>) -> Layout {
    let parts = scene_parts(start);
    let mut best = start.clone();
    let (mut low, mut high) = (limits.bound, best.cost());
    for _ in 0..LEVELS {
        if high - low < PRECISION * low {
            break;
        }
        let level = (low + high) / 2.0;
        let mut search = Search {
            layout: start.clone(),
            levels: parts.iter().map(|part| part * level).collect(),
            origin: limits.origin,
            allowed: limits.allowed,
            left: limits.transfers.min(UNLIMITED) as isize,
            least_gain: LEAST_GAIN * limits.bound,
        };
        search.run();
        search.layout.refresh();
        let cost = search.layout.cost();
        if cost < best.cost() {
            best = search.layout;
        }
        if cost <= level * (1.0 + PRECISION) {
            high = level;
        } else {
            low = level;
        }
    }
    best
}

/// Each scene's part of all load. A level of cost is shared out to scenes like that.
fn scene_parts(layout: &Layout) -> Vec<f64> {
    let sums: Vec<f64> =
        (0..layout.scenes).map(|t| layout.loads.iter().skip(t).step_by(layout.scenes).sum()).collect();
    let total: f64 = sums.iter().sum();
    sums.iter().map(|sum| if total > 0.0 { sum / total } else { 0.0 }).collect()
}

struct Search<'a> {
    layout: Layout,
    /// `[scenes]`: loads above these are too much.
    levels: Vec<f64>,
    origin: Option<&'a Layout>,
    allowed: &'a [bool],
    /// Transfers at hand.
    left: isize,
    least_gain: f64,
}

impl Search<'_> {
    fn run(&mut self) {
        // Every change lowers the excess; the limit keeps the tail of small gains short.
        for _ in 0..self.layout.slots.len() / 2 + 16 {
            let Some(rank) = self.highest() else { return };
            let Some(change) = self.best_change(rank) else { return };
            self.left -= change.cost;
            match change.kind {
                Kind::Swap { a, b } => self.layout.swap(a, b),
                Kind::Replace { slot, expert } => self.layout.replace(slot, expert),
            }
        }
    }

    /// The rank with the most load above the levels.
    fn highest(&self) -> Option<usize> {
        let excess = |rank: usize| self.excess(self.layout.load(rank));
        let (most, rank) = (0..self.layout.ranks)
            .map(|rank| (excess(rank), rank))
            .fold((0.0, 0), |a, b| if b.0 > a.0 { b } else { a });
        (most > self.least_gain).then_some(rank)
    }

    fn excess(&self, load: &[f64]) -> f64 {
        load.iter().zip(&self.levels).map(|(load, level)| (load - level).max(0.0)).sum()
    }

    /// Transfers that putting an expert on a rank costs.
    fn arrival(&self, rank: usize, expert: u32) -> isize {
        isize::from(expert != NONE && !self.origin.is_some_and(|origin| origin.holds(rank, expert)))
    }

    /// The change at the highest rank that lowers the excess most per transfer.
    fn best_change(&self, rank: usize) -> Option<Change> {
        let mut best = None;
        self.swaps(rank, &mut best);
        self.copies_elsewhere(rank, &mut best);
        self.copies_here(rank, &mut best);
        best
    }

    fn consider(&self, best: &mut Option<Change>, gain: f64, cost: isize, kind: Kind) {
        if gain <= self.least_gain || cost > self.left {
            return;
        }
        let rate = |gain: f64, cost: isize| gain / (cost.max(0) as f64 + 0.1);
        if best.is_none_or(|best| rate(gain, cost) > rate(best.gain, best.cost)) {
            *best = Some(Change { gain, cost, kind });
        }
    }

    fn slots_of(&self, rank: usize) -> std::ops::Range<usize> {
        rank * self.layout.slots_per_rank..(rank + 1) * self.layout.slots_per_rank
    }

    /// Exchanges of one of the rank's slots with a slot of another.
    fn swaps(&self, rank: usize, best: &mut Option<Change>) {
        let layout = &self.layout;
        let before = self.excess(layout.load(rank));
        for other in (0..layout.ranks).filter(|other| *other != rank && self.is_allowed(*other)) {
            let other_before = self.excess(layout.load(other));
            for a in self.slots_of(rank).filter(|slot| layout.slots[*slot] != NONE) {
                let give = layout.slots[a];
                if layout.holds(other, give) {
                    continue;
                }
                for b in self.slots_of(other) {
                    let take = layout.slots[b];
                    if take != NONE && layout.holds(rank, take) {
                        continue;
                    }
                    let (mut after, mut other_after) = (0.0, 0.0);
                    for t in 0..layout.scenes {
                        let taken = if take == NONE { 0.0 } else { layout.share(take)[t] };
                        let less = layout.share(give)[t] - taken;
                        after += (layout.load(rank)[t] - less - self.levels[t]).max(0.0);
                        other_after += (layout.load(other)[t] + less - self.levels[t]).max(0.0);
                    }
                    let gain = before + other_before - after - other_after;
                    if gain > self.least_gain {
                        let cost = self.arrival(rank, take) + self.arrival(other, give)
                            - self.arrival(rank, give)
                            - self.arrival(other, take);
                        self.consider(best, gain, cost, Kind::Swap { a, b });
                    }
                }
            }
        }
    }

    /// Another copy of one of the rank's experts on another rank, in place of a copy that is not the last or in an empty slot.
    fn copies_elsewhere(&self, rank: usize, best: &mut Option<Change>) {
        for a in self.slots_of(rank) {
            let expert = self.layout.slots[a];
            if expert == NONE {
                continue;
            }
            for slot in 0..self.layout.slots.len() {
                let other = slot / self.layout.slots_per_rank;
                if other != rank
                    && self.is_allowed(other)
                    && self.is_spare(slot)
                    && !self.layout.holds(other, expert)
                {
                    self.consider_replacement(slot, expert, best);
                }
            }
        }
    }

    /// Another expert in place of a copy on the rank that is not its last.
    fn copies_here(&self, rank: usize, best: &mut Option<Change>) {
        for slot in self.slots_of(rank) {
            if self.layout.slots[slot] == NONE || !self.is_spare(slot) {
                continue;
            }
            // A copy given up costs no transfer, but whoever compares two maps sees a change beyond the limit.
            if self.origin.is_none() {
                self.consider_replacement(slot, NONE, best);
            }
            for expert in 0..self.layout.copies.len() as u32 {
                if !self.layout.holds(rank, expert) {
                    self.consider_replacement(slot, expert, best);
                }
            }
        }
    }

    fn is_allowed(&self, rank: usize) -> bool {
        self.allowed.is_empty() || self.allowed[rank]
    }

    fn is_spare(&self, slot: usize) -> bool {
        let held = self.layout.slots[slot];
        held == NONE || self.layout.copies[held as usize] > 1
    }

    fn consider_replacement(&self, slot: usize, expert: u32, best: &mut Option<Change>) {
        let layout = &self.layout;
        let rank = slot / layout.slots_per_rank;
        let old = layout.slots[slot];
        let mut gain = 0.0;
        for t in 0..layout.scenes {
            let level = self.levels[t];
            let above = |load: f64| (load - level).max(0.0);
            let rise = if old == NONE {
                0.0
            } else {
                layout.share(old)[t] / f64::from(layout.copies[old as usize] - 1)
            };
            let fall = if expert == NONE {
                0.0
            } else {
                layout.share(expert)[t] / f64::from(layout.copies[expert as usize] + 1)
            };
            let load = |rank: usize| layout.load(rank)[t];
            let arrived = if expert == NONE { 0.0 } else { layout.share(expert)[t] - fall };
            let left = if old == NONE { 0.0 } else { layout.share(old)[t] };
            gain += above(load(rank)) - above(load(rank) - left + arrived);
            if old != NONE {
                for host in layout.hosts(old).filter(|host| *host != rank) {
                    let both = expert != NONE && layout.holds(host, expert);
                    let after = load(host) + rise - if both { fall } else { 0.0 };
                    gain += above(load(host)) - above(after);
                }
            }
            if expert != NONE {
                for host in layout.hosts(expert) {
                    if old == NONE || !layout.holds(host, old) {
                        gain += above(load(host)) - above(load(host) - fall);
                    }
                }
            }
        }
        if gain > self.least_gain {
            let cost = self.arrival(rank, expert) - self.arrival(rank, old);
            self.consider(best, gain, cost, Kind::Replace { slot, expert });
        }
    }
}
