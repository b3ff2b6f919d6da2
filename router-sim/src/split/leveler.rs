//! The exact split: integer tokens on slots such that no other split has a smaller largest rank load.
//!
//! More than that: the loads are decreasingly minimal. The largest is as small as can be, then as few ranks as can be
//! have it, then the second largest, and so on; no token can move, over any chain of experts, from a rank to one with
//! two tokens less. Such loads differ by less than one token per rank from the best loads with divisible tokens (Frank and
//! Murota, "Decreasing minimization on M-convex sets", 2018).
//!
//! The method is maximum flow by shortest augmenting paths (Edmonds and Karp, 1972) towards a level, found by divide and
//! conquer. A set of ranks aims at its mean load. Where ranks above the mean cannot pass tokens on to ranks below it,
//! all they can reach is full: no token of that closed set may go elsewhere, so it is levelled by itself, and the rest by
//! itself. The set with the highest mean proves that the largest load is optimal: it is the bottleneck.

use std::ops::Range;

use crate::placement::LayerPlacement;

/// Marks a rank that a search did not reach.
const UNREACHED: (u32, u32) = (u32::MAX, 0);
/// Marks a rank that a search started from.
const ROOT: (u32, u32) = (u32::MAX, 1);

/// Tokens of one layer on its slots, and the search that levels the ranks. Buffers are reused.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leveler {
    /// `[slots]`
    tokens: Vec<u64>,
    /// `[ranks]`
    loads: Vec<u64>,
    /// `[slots]`
    ranks: Vec<u32>,
    /// `[ranks + 1]`: where each rank's slots begin in `movable`.
    starts: Vec<u32>,
    /// Slots of experts with other replicas, grouped by rank.
    movable: Vec<u32>,
    /// The ranks; those of one set are neighbours.
    order: Vec<u32>,
    /// `[ranks]`: the set a rank is in, named by where it begins in `order`.
    set: Vec<u32>,
    /// Sets that are not level yet.
    open: Vec<Range<usize>>,
    /// Sets that are level.
    level: Vec<Range<usize>>,
    /// `[ranks]`: the slots a token moves from and to on the search's way to a rank.
    via: Vec<(u32, u32)>,
    queue: Vec<u32>,
    /// Replicated experts with tokens, by tokens per replica.
    pouring: Vec<(u64, u32)>,
}

/// Which way a search follows the moves of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// From ranks with too many tokens to ranks with room.
    Down,
    /// From ranks with too few tokens to ranks that can spare some.
    Up,
}

impl Leveler {
    /// Tokens on each slot, rank-major; `[slots]`.
    pub fn tokens(&self) -> &[u64] {
        &self.tokens
    }

    /// After [`Leveler::level`]: the ranks that bound the largest load, ascending. What they hold, they hold under any split.
    pub fn bottleneck(&self) -> Vec<usize> {
        let mean = |set: &Range<usize>| {
            (
                self.order[set.clone()].iter().map(|g| u128::from(self.loads[*g as usize])).sum::<u128>(),
                set.len(),
            )
        };
        let above = |a: &(u128, usize), b: &(u128, usize)| a.0 * b.1 as u128 > b.0 * a.1 as u128;
        let Some(first) = self.level.first() else { return Vec::new() };
        let highest = self.level.iter().fold(mean(first), |best, set| {
            let this = mean(set);
            if above(&this, &best) { this } else { best }
        });
        let mut ranks: Vec<usize> = Vec::new();
        for set in self.level.iter().filter(|set| !above(&highest, &mean(set))) {
            ranks.extend(self.order[set.start..set.end].iter().map(|g| *g as usize));
        }
        ranks.sort_unstable();
        ranks
    }

    /// Puts all tokens on slots: single-copy experts first, then the others, most tokens per replica first, poured into
    /// the ranks that hold them so that the lowest rise together. `tokens` is `[experts]`; its sum fits u64. `home` is
    /// what each slot holds before anything is poured, `[slots]`, or empty; single-copy experts have nothing there.
    pub fn water_fill(&mut self, layer: LayerPlacement<'_>, tokens: &[u64], home: &[u64]) {
        self.index(layer);
        self.pouring.clear();
        for (expert, &n) in tokens.iter().enumerate() {
            let replicas = layer.replicas(expert);
            if let [slot] = replicas {
                self.add(*slot as usize, n);
            } else if n > 0 {
                self.pouring.push((n / replicas.len() as u64, expert as u32));
            }
        }
        self.pouring.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        for i in 0..self.pouring.len() {
            let expert = self.pouring[i].1 as usize;
            let mut poured = tokens[expert];
            if !home.is_empty() {
                for &slot in layer.replicas(expert) {
                    self.add(slot as usize, home[slot as usize]);
                    poured -= home[slot as usize];
                }
            }
            self.pour(layer.replicas(expert), poured);
        }
    }

    /// Lists which slot is on which rank, and those whose tokens have a choice; no tokens anywhere yet.
    fn index(&mut self, layer: LayerPlacement<'_>) {
        let (slots, ranks) = (layer.slots().len(), layer.ranks());
        reset(&mut self.tokens, slots, 0);
        reset(&mut self.loads, ranks, 0);
        self.ranks.clear();
        self.movable.clear();
        self.starts.clear();
        for (rank, held) in layer.slots().chunks(layer.slots_per_rank()).enumerate() {
            self.starts.push(self.movable.len() as u32);
            for &expert in held {
                let slot = self.ranks.len() as u32;
                self.ranks.push(rank as u32);
                if expert >= 0 && layer.replicas(expert as usize).len() > 1 {
                    self.movable.push(slot);
                }
            }
        }
        self.starts.push(self.movable.len() as u32);
    }

    fn add(&mut self, slot: usize, tokens: u64) {
        self.tokens[slot] += tokens;
        self.loads[self.ranks[slot] as usize] += tokens;
    }

    /// Pours one expert's tokens into its slots, lowest rank first. Of two slots on one rank the first is used.
    fn pour(&mut self, slots: &[u32], tokens: u64) {
        let (loads, ranks) = (&self.loads, &self.ranks);
        let load = |slot: u32| loads[ranks[slot as usize] as usize];
        // The queue is free here.
        self.queue.clear();
        self.queue.extend_from_slice(slots);
        self.queue.dedup_by_key(|slot| ranks[*slot as usize]);
        self.queue.sort_unstable_by_key(|slot| (load(*slot), *slot));
        // Raise the ranks of the first `wet` slots together until the tokens are used up.
        let (mut wet, mut surface, mut left) = (1, load(self.queue[0]), tokens);
        while wet < self.queue.len() {
            let next = load(self.queue[wet]);
            let needed = (next - surface).saturating_mul(wet as u64);
            if needed > left {
                break;
            }
            (left, surface, wet) = (left - needed, next, wet + 1);
        }
        surface += left / wet as u64;
        let over = left % wet as u64;
        for i in 0..wet {
            let slot = self.queue[i] as usize;
            let level = surface + u64::from((i as u64) < over);
            self.add(slot, level - self.loads[self.ranks[slot] as usize]);
        }
    }

    /// Moves tokens between replicas until the ranks' loads are decreasingly minimal.
    pub fn level(&mut self, layer: LayerPlacement<'_>) {
        let ranks = self.loads.len();
        self.order.clear();
        self.order.extend(0..ranks as u32);
        reset(&mut self.set, ranks, 0);
        reset(&mut self.via, ranks, UNREACHED);
        self.level.clear();
        self.open.clear();
        self.open.push(0..ranks);
        while let Some(set) = self.open.pop() {
            let total: u128 =
                self.order[set.clone()].iter().map(|g| u128::from(self.loads[*g as usize])).sum();
            let count = set.len() as u128;
            let (floor, ceiling) = ((total / count) as u64, total.div_ceil(count) as u64);
            match self.move_all(layer, &set, Way::Down, ceiling) && self.move_all(layer, &set, Way::Up, floor)
            {
                true => self.level.push(set),
                false => self.divide(set),
            }
        }
    }

    /// Moves tokens until no rank of the set is above (or below) the target. False when some rank must stay there: the
    /// last search has then reached exactly the ranks that share its fate.
    fn move_all(&mut self, layer: LayerPlacement<'_>, set: &Range<usize>, way: Way, target: u64) -> bool {
        loop {
            match self.search(layer, set, way, target) {
                0 => return true,
                _ if !self.augment(way, target) => return false,
                _ => {}
            }
        }
    }

    /// A breadth-first search from all ranks of the set beyond the target. Returns how many those are.
    fn search(&mut self, layer: LayerPlacement<'_>, set: &Range<usize>, way: Way, target: u64) -> usize {
        self.queue.clear();
        for &rank in &self.order[set.clone()] {
            self.via[rank as usize] = UNREACHED;
            if is_beyond(self.loads[rank as usize], way, target) {
                self.via[rank as usize] = ROOT;
                self.queue.push(rank);
            }
        }
        let roots = self.queue.len();
        let mut next = 0;
        while next < self.queue.len() && self.queue.len() < set.len() {
            let rank = self.queue[next] as usize;
            next += 1;
            for i in self.starts[rank]..self.starts[rank + 1] {
                let here = self.movable[i as usize];
                if way == Way::Down && self.tokens[here as usize] == 0 {
                    continue;
                }
                for &there in layer.replicas(layer.slots()[here as usize] as usize) {
                    let other = self.ranks[there as usize] as usize;
                    let usable = way == Way::Down || self.tokens[there as usize] > 0;
                    if usable && self.set[other] == set.start as u32 && self.via[other] == UNREACHED {
                        self.via[other] = (here, there);
                        self.queue.push(other as u32);
                    }
                }
            }
        }
        roots
    }

    /// Moves tokens along the last search's ways to every rank on the other side of the target. False when none moved.
    fn augment(&mut self, way: Way, target: u64) -> bool {
        let mut moved = false;
        for i in 0..self.queue.len() {
            let end = self.queue[i] as usize;
            if self.loads[end] == target || is_beyond(self.loads[end], way, target) {
                continue;
            }
            let mut tokens = self.loads[end].abs_diff(target);
            let mut rank = end;
            while self.via[rank] != ROOT {
                let (here, there) = self.via[rank];
                let from = if way == Way::Down { here } else { there };
                tokens = tokens.min(self.tokens[from as usize]);
                rank = self.ranks[here as usize] as usize;
            }
            // An earlier way may have brought this root to the target, or emptied a slot.
            if !is_beyond(self.loads[rank], way, target) {
                continue;
            }
            tokens = tokens.min(self.loads[rank].abs_diff(target));
            if tokens == 0 {
                continue;
            }
            moved = true;
            let mut rank = end;
            while self.via[rank] != ROOT {
                let (here, there) = self.via[rank];
                let (from, to) = if way == Way::Down { (here, there) } else { (there, here) };
                self.tokens[from as usize] -= tokens;
                self.tokens[to as usize] += tokens;
                rank = self.ranks[here as usize] as usize;
            }
            let (giver, taker) = if way == Way::Down { (rank, end) } else { (end, rank) };
            self.loads[giver] -= tokens;
            self.loads[taker] += tokens;
        }
        moved
    }

    /// Splits a set into the ranks the last search reached and the others.
    fn divide(&mut self, set: Range<usize>) {
        let mut middle = set.start;
        for i in set.clone() {
            if self.via[self.order[i] as usize] != UNREACHED {
                self.order.swap(i, middle);
                middle += 1;
            }
        }
        assert!(
            set.start < middle && middle < set.end,
            "a closed set of {} of {} ranks",
            middle - set.start,
            set.len()
        );
        for &rank in &self.order[middle..set.end] {
            self.set[rank as usize] = middle as u32;
        }
        self.open.push(set.start..middle);
        self.open.push(middle..set.end);
    }
}

/// Whether a load is on the side of the target that must not be.
fn is_beyond(load: u64, way: Way, target: u64) -> bool {
    match way {
        Way::Down => load > target,
        Way::Up => load < target,
    }
}

fn reset<T: Clone>(buffer: &mut Vec<T>, len: usize, value: T) {
    buffer.clear();
    buffer.resize(len, value);
}
