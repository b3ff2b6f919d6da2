//! Exchanges between the most loaded rank and another that lower the larger of the two loads, for one scene.

use super::layout::{Layout, NONE};

/// More than the loads of all experts together, which are at most 1.
const KIND_GAP: f64 = 4.0;
/// Trades that gain less than this part of the target are rounding.
const LEAST_GAIN: f64 = 1e-7;

/// Slots of each rank, heaviest share first, kept in step with a layout of one scene.
pub struct Exchange<'a> {
    layout: &'a mut Layout,
    /// `[ranks][slots_per_rank]`: (share, slot), largest first.
    sorted: Vec<(f64, u32)>,
    /// The ranks, least load first.
    coldest: Vec<u32>,
    /// Sums of two slots: (sum, the two as places in `sorted` of their rank); one list for the hot rank, one for the other.
    pairs: [Vec<(f64, u16, u16)>; 2],
    /// Added to the shares of copies of replicated experts: a large one makes any trade across kinds look bad.
    kind_gap: f64,
}

/// What one rank gives the other for what, and the larger of the two loads afterwards.
#[derive(Clone, Copy)]
struct Trade {
    cost: f64,
    give: [u32; 2],
    take: [u32; 2],
    /// Slots exchanged: 1 or 2.
    slots: usize,
}

impl<'a> Exchange<'a> {
    /// Exchanges of anything for anything or, `within_kinds`, of replicated experts' copies for such copies and of whole
    /// experts for whole experts.
    ///
    /// # Panics
    /// When the layout has several scenes.
    pub fn new(layout: &'a mut Layout, within_kinds: bool) -> Self {
        let kind_gap = if within_kinds { KIND_GAP } else { 0.0 };
        assert_eq!(layout.scenes, 1, "scenes");
        let mut exchange = Exchange {
            sorted: vec![(0.0, 0); layout.slots.len()],
            coldest: (0..layout.ranks as u32).collect(),
            pairs: Default::default(),
            kind_gap,
            layout,
        };
        (0..exchange.layout.ranks).for_each(|rank| exchange.sort(rank));
        exchange
    }

    /// Trades until no rank is above `target`, or no trade helps the most loaded one, or `trades` are used up. Returns
    /// what is left of `trades`.
    pub fn level(&mut self, target: f64, mut trades: usize) -> usize {
        while trades > 0 {
            self.sort_ranks();
            let hot = *self.coldest.last().expect("a rank") as usize;
            if self.layout.loads[hot] <= target {
                break;
            }
            let Some(trade) = self.single_trade(hot, target).or_else(|| self.double_trade(hot, target))
            else {
                break;
            };
            for i in 0..trade.slots {
                self.layout.swap(trade.give[i] as usize, trade.take[i] as usize);
            }
            self.sort(hot);
            self.sort(trade.take[0] as usize / self.layout.slots_per_rank);
            trades -= 1;
        }
        self.layout.refresh();
        trades
    }

    /// The coldest ranks, with which trades gain most, first.
    fn sort_ranks(&mut self) {
        let loads = &self.layout.loads;
        self.coldest
            .sort_unstable_by(|a, b| loads[*a as usize].total_cmp(&loads[*b as usize]).then(a.cmp(b)));
    }

    fn sort(&mut self, rank: usize) {
        let width = self.layout.slots_per_rank;
        let own = &mut self.sorted[rank * width..(rank + 1) * width];
        for (i, entry) in own.iter_mut().enumerate() {
            let slot = rank * width + i;
            let expert = self.layout.slots[slot];
            let share = match expert {
                NONE => 0.0,
                e if self.layout.copies[e as usize] > 1 => self.layout.shares[e as usize] + self.kind_gap,
                e => self.layout.shares[e as usize],
            };
            *entry = (share, slot as u32);
        }
        // Few and almost sorted.
        for i in 1..own.len() {
            let mut j = i;
            while j > 0 && own[j].0 > own[j - 1].0 {
                own.swap(j, j - 1);
                j -= 1;
            }
        }
    }

    fn of(&self, rank: usize) -> &[(f64, u32)] {
        &self.sorted[rank * self.layout.slots_per_rank..(rank + 1) * self.layout.slots_per_rank]
    }

    /// Whether what is in `slot` may move to `rank`.
    fn fits(&self, slot: u32, rank: usize) -> bool {
        let expert = self.layout.slots[slot as usize];
        expert == NONE || !self.layout.holds(rank, expert)
    }

    /// The best exchange of one slot for one.
    fn single_trade(&self, hot: usize, target: f64) -> Option<Trade> {
        let loads = &self.layout.loads;
        let mut best = Trade { cost: loads[hot] - LEAST_GAIN * target, give: [0; 2], take: [0; 2], slots: 0 };
        for other in self.coldest[..self.layout.ranks - 1].iter().map(|rank| *rank as usize) {
            // The ideal takes half of the difference; what is taken grows with what is given.
            let half = (loads[hot] - loads[other]) / 2.0;
            if loads[hot] - half >= best.cost {
                break;
            }
            let (own, theirs) = (self.of(hot), self.of(other));
            let mut next = 0;
            for &(share, give) in own {
                while next < theirs.len() && theirs[next].0 > share - half {
                    next += 1;
                }
                for &(other_share, take) in &theirs[next.saturating_sub(1)..(next + 1).min(theirs.len())] {
                    let less = share - other_share;
                    let cost = (loads[hot] - less).max(loads[other] + less);
                    if cost < best.cost && self.fits(give, other) && self.fits(take, hot) {
                        best = Trade { cost, give: [give; 2], take: [take; 2], slots: 1 };
                    }
                }
            }
            if best.cost <= target {
                break;
            }
        }
        (best.slots > 0).then_some(best)
    }

    /// The best exchange of two slots for two.
    fn double_trade(&mut self, hot: usize, target: f64) -> Option<Trade> {
        let [mut own, mut theirs] = std::mem::take(&mut self.pairs);
        self.list_pairs(hot, &mut own);
        let loads = &self.layout.loads;
        let mut best = Trade { cost: loads[hot] - LEAST_GAIN * target, give: [0; 2], take: [0; 2], slots: 0 };
        for other in self.coldest[..self.layout.ranks - 1].iter().map(|rank| *rank as usize) {
            let half = (loads[hot] - loads[other]) / 2.0;
            if loads[hot] - half >= best.cost {
                break;
            }
            self.list_pairs(other, &mut theirs);
            let mut next = 0;
            for &(share, a, b) in &own {
                while next < theirs.len() && theirs[next].0 > share - half {
                    next += 1;
                }
                for &(other_share, c, d) in &theirs[next.saturating_sub(1)..(next + 1).min(theirs.len())] {
                    let less = share - other_share;
                    let cost = (loads[hot] - less).max(loads[other] + less);
                    if cost >= best.cost {
                        continue;
                    }
                    let slot = |rank: usize, place: u16| self.of(rank)[place as usize].1;
                    let (give, take) = ([slot(hot, a), slot(hot, b)], [slot(other, c), slot(other, d)]);
                    if give.iter().all(|s| self.fits(*s, other)) && take.iter().all(|s| self.fits(*s, hot)) {
                        best = Trade { cost, give, take, slots: 2 };
                    }
                }
            }
            if best.cost <= target {
                break;
            }
        }
        self.pairs = [own, theirs];
        (best.slots > 0).then_some(best)
    }

    /// All pairs of a rank's slots, largest sum first.
    fn list_pairs(&self, rank: usize, pairs: &mut Vec<(f64, u16, u16)>) {
        let own = self.of(rank);
        pairs.clear();
        for i in 0..own.len() {
            for j in i + 1..own.len() {
                pairs.push((own[i].0 + own[j].0, i as u16, j as u16));
            }
        }
        pairs.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    }
}
