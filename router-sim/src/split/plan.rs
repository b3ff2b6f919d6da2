//! One layer's quotas per source rank and slot, and the dealing of rows by them.

use std::ops::Range;

use super::{Shares, Split, by_source};
use crate::placement::LayerPlacement;

/// One layer's split in one step, and the cursor of a source rank that deals its rows. Made once and rebuilt for every
/// layer of every step: it allocates only until its buffers are large enough.
#[derive(Debug, Clone, Default)]
pub struct SplitPlan {
    split: Split,
    shares: Shares,
    dealer: Dealer,
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
    /// each expert. Where the sources are a whole multiple of the placement's ranks, as many consecutive ones belong to
    /// each rank.
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
        match self.split {
            // Nothing to choose, which most layers of most placements come to.
            _ if !layer.is_replicated() => {
                for (counts, quotas) in counts.chunks(experts).zip(self.quotas.chunks_mut(self.slots)) {
                    fill_single_copies(layer, counts, quotas);
                }
            }
            Split::Random { seed } => by_source::random(seed, layer, counts, &mut self.quotas),
            Split::Nearest { ranks_per_node } => {
                by_source::nearest(ranks_per_node, layer, counts, &mut self.quotas)
            }
            Split::Even | Split::WaterFill | Split::Exact | Split::Activated { .. } => {
                let local_first = self.split != Split::Even;
                self.dealer.count(layer, counts, local_first);
                let shares = self.shares.fill(self.split, layer, &self.dealer.totals, &self.dealer.home);
                self.dealer.deal(layer, counts, shares, local_first, &mut self.quotas);
            }
        }
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

/// Cuts each slot's share into quotas of the source ranks.
#[derive(Debug, Clone, Default)]
struct Dealer {
    /// `[experts]`: tokens of all sources.
    totals: Vec<u64>,
    /// `[slots]`, or empty: tokens of replicated experts whose source is on the slot's rank.
    home: Vec<u64>,
    /// `[sources]`: tokens of one expert that have no slot yet.
    waiting: Vec<u32>,
    /// `[replicas]`: tokens that one expert's slots still take.
    room: Vec<u64>,
}

impl Dealer {
    /// Sums up each expert's tokens and, with `local_first`, those that a slot's own rank sends.
    fn count(&mut self, layer: LayerPlacement<'_>, counts: &[u32], local_first: bool) {
        let experts = layer.experts();
        self.totals.clear();
        self.totals.resize(experts, 0);
        for row in counts.chunks(experts) {
            for (sum, n) in self.totals.iter_mut().zip(row) {
                *sum += u64::from(*n);
            }
        }
        self.home.clear();
        let per_rank = sources_per_rank(layer, counts);
        if !local_first || per_rank == 0 {
            return;
        }
        self.home.resize(layer.slots().len(), 0);
        for expert in (0..experts).filter(|e| layer.replicas(*e).len() > 1) {
            let mut last = None;
            for &slot in layer.replicas(expert) {
                let rank = layer.rank_of(slot as usize);
                // Of two slots on one rank the first is used.
                if last.replace(rank) != Some(rank) {
                    let own = &counts[rank * per_rank * experts..(rank + 1) * per_rank * experts];
                    self.home[slot as usize] =
                        own.iter().skip(expert).step_by(experts).map(|n| u64::from(*n)).sum();
                }
            }
        }
    }

    /// Fills `quotas` `[sources][slots]`, all zero before. With `local_first`, tokens stay on the rank of their source
    /// as far as its slots' shares reach. All others, in canonical order, are cut into one run per slot.
    fn deal(
        &mut self,
        layer: LayerPlacement<'_>,
        counts: &[u32],
        shares: &[u64],
        local_first: bool,
        quotas: &mut [u32],
    ) {
        let (experts, slots) = (layer.experts(), layer.slots().len());
        let per_rank = sources_per_rank(layer, counts);
        for (counts, quotas) in counts.chunks(experts).zip(quotas.chunks_mut(slots)) {
            fill_single_copies(layer, counts, quotas);
        }
        for (expert, &total) in self.totals.iter().enumerate() {
            let replicas = layer.replicas(expert);
            if total == 0 || replicas.len() == 1 {
                continue;
            }
            self.waiting.clear();
            self.waiting.extend(counts.iter().skip(expert).step_by(experts));
            self.room.clear();
            self.room.extend(replicas.iter().map(|slot| shares[*slot as usize]));
            let shared: u64 = self.room.iter().sum();
            assert_eq!(shared, total, "shares of expert {expert} against its tokens");
            if local_first {
                for (&slot, room) in replicas.iter().zip(&mut self.room) {
                    let rank = layer.rank_of(slot as usize);
                    for source in rank * per_rank..(rank + 1) * per_rank {
                        let quota = &mut quotas[source * slots + slot as usize];
                        move_tokens(&mut self.waiting[source], room, quota);
                    }
                }
            }
            let mut replica = 0;
            for (source, waiting) in self.waiting.iter_mut().enumerate() {
                while *waiting > 0 {
                    let quota = &mut quotas[source * slots + replicas[replica] as usize];
                    move_tokens(waiting, &mut self.room[replica], quota);
                    replica += usize::from(*waiting > 0);
                }
            }
        }
    }
}

/// Source ranks that belong to each rank of the placement; 0 when they do not divide.
pub(super) fn sources_per_rank(layer: LayerPlacement<'_>, counts: &[u32]) -> usize {
    let sources = counts.len() / layer.experts();
    if sources.is_multiple_of(layer.ranks()) { sources / layer.ranks() } else { 0 }
}

/// One source's tokens of experts with one replica: no choice. Row by row, because most experts are like that.
pub(super) fn fill_single_copies(layer: LayerPlacement<'_>, counts: &[u32], quotas: &mut [u32]) {
    for (expert, &tokens) in counts.iter().enumerate() {
        if let [slot] = layer.replicas(expert) {
            quotas[*slot as usize] = tokens;
        }
    }
}

/// As many waiting tokens as there is room for become quota.
fn move_tokens(waiting: &mut u32, room: &mut u64, quota: &mut u32) {
    // At most what waits, so it fits.
    let n = u64::from(*waiting).min(*room) as u32;
    *waiting -= n;
    *room -= u64::from(n);
    *quota += n;
}
