//! The decode split: few activated experts per rank, but not at any price in tokens.
//!
//! Two extremes are exact. Levelling experts, each whole on one replica, has the fewest activated experts on the worst
//! rank; levelling tokens has the fewest tokens there. The better of the two is then improved by moves of an expert, or of
//! some of its tokens, away from the rank that costs most, while they lower the cost.

use super::leveler::Leveler;
use crate::placement::LayerPlacement;

/// Reused buffers.
#[derive(Debug, Clone, Default)]
pub(super) struct Activated {
    ones: Vec<u64>,
    best: State,
    other: State,
}

/// Tokens on slots, and what they cost.
#[derive(Debug, Clone, Default)]
struct State {
    expert_cost: u128,
    token_cost: u128,
    /// `[slots]`
    tokens: Vec<u64>,
    /// `[ranks]`: slots with tokens.
    activated: Vec<u64>,
    /// `[ranks]`
    loads: Vec<u64>,
}

/// Tokens that leave a slot for another replica, and the larger cost of the two ranks afterwards.
struct Move {
    from: usize,
    to: usize,
    tokens: u64,
    cost: u128,
}

impl Activated {
    /// Tokens of each slot; `[slots]`.
    pub fn fill(
        &mut self,
        leveler: &mut Leveler,
        layer: LayerPlacement<'_>,
        tokens: &[u64],
        expert_cost: u32,
        token_cost: u32,
    ) -> &[u64] {
        leveler.water_fill(layer, tokens, &[]);
        leveler.level(layer);
        self.best.set(layer, leveler.tokens(), expert_cost, token_cost);
        self.ones.clear();
        self.ones.extend(tokens.iter().map(|n| (*n).min(1)));
        leveler.water_fill(layer, &self.ones, &[]);
        leveler.level(layer);
        self.other.set(layer, leveler.tokens(), expert_cost, token_cost);
        self.other.fill_with(layer, tokens);
        for state in [&mut self.best, &mut self.other] {
            state.improve(layer);
        }
        if self.other.cost() < self.best.cost() {
            std::mem::swap(&mut self.best, &mut self.other);
        }
        &self.best.tokens
    }
}

impl State {
    fn set(&mut self, layer: LayerPlacement<'_>, tokens: &[u64], expert_cost: u32, token_cost: u32) {
        (self.expert_cost, self.token_cost) = (u128::from(expert_cost), u128::from(token_cost));
        self.tokens.clear();
        self.tokens.extend_from_slice(tokens);
        self.count(layer);
    }

    /// Where a slot holds anything, it now holds all its expert's tokens.
    fn fill_with(&mut self, layer: LayerPlacement<'_>, tokens: &[u64]) {
        for (held, &expert) in self.tokens.iter_mut().zip(layer.slots()) {
            if *held > 0 {
                *held = tokens[expert as usize];
            }
        }
        self.count(layer);
    }

    fn count(&mut self, layer: LayerPlacement<'_>) {
        let ranks = || self.tokens.chunks(layer.slots_per_rank());
        self.loads.clear();
        self.loads.extend(ranks().map(|held| held.iter().sum::<u64>()));
        self.activated.clear();
        self.activated.extend(ranks().map(|held| held.iter().filter(|n| **n > 0).count() as u64));
    }

    fn cost_of(&self, activated: u64, tokens: u64) -> u128 {
        (u128::from(activated) * self.expert_cost).max(u128::from(tokens) * self.token_cost)
    }

    fn rank_cost(&self, rank: usize) -> u128 {
        self.cost_of(self.activated[rank], self.loads[rank])
    }

    /// The largest of any rank.
    fn cost(&self) -> u128 {
        (0..self.loads.len()).map(|rank| self.rank_cost(rank)).max().unwrap_or(0)
    }

    /// Moves tokens off the rank that costs most while that lowers the larger cost of the two ranks.
    fn improve(&mut self, layer: LayerPlacement<'_>) {
        // Every move helps, but some by a token only: a limit keeps the worst case short.
        for _ in 0..4 * self.tokens.len() {
            let costs = (0..self.loads.len()).map(|rank| (self.rank_cost(rank), rank));
            let Some((cost, rank)) = costs.max_by_key(|(cost, rank)| (*cost, std::cmp::Reverse(*rank)))
            else {
                return;
            };
            match self.best_move(layer, rank).filter(|best| best.cost < cost) {
                Some(best) => self.apply(layer, &best),
                None => return,
            }
        }
    }

    fn best_move(&self, layer: LayerPlacement<'_>, rank: usize) -> Option<Move> {
        let mut best: Option<Move> = None;
        let own = rank * layer.slots_per_rank()..(rank + 1) * layer.slots_per_rank();
        for from in own.filter(|slot| self.tokens[*slot] > 0) {
            let expert = layer.slots()[from] as usize;
            for to in layer.replicas(expert).iter().map(|slot| *slot as usize) {
                let other = layer.rank_of(to);
                if other == rank {
                    continue;
                }
                let all = self.tokens[from];
                let half = self.loads[rank].saturating_sub(self.loads[other]) / 2;
                for tokens in [all, half.min(all)] {
                    let left = self
                        .cost_of(self.activated[rank] - u64::from(tokens == all), self.loads[rank] - tokens);
                    let joined = self.cost_of(
                        self.activated[other] + u64::from(self.tokens[to] == 0),
                        self.loads[other] + tokens,
                    );
                    let cost = left.max(joined);
                    if tokens > 0 && best.as_ref().is_none_or(|best| cost < best.cost) {
                        best = Some(Move { from, to, tokens, cost });
                    }
                }
            }
        }
        best
    }

    fn apply(&mut self, layer: LayerPlacement<'_>, Move { from, to, tokens, .. }: &Move) {
        let (giver, taker) = (layer.rank_of(*from), layer.rank_of(*to));
        self.activated[taker] += u64::from(self.tokens[*to] == 0);
        self.tokens[*from] -= tokens;
        self.tokens[*to] += tokens;
        self.activated[giver] -= u64::from(self.tokens[*from] == 0);
        self.loads[giver] -= tokens;
        self.loads[taker] += tokens;
    }
}
