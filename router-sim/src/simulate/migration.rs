//! A migration under way, round by round.

use crate::cost::CostModel;
use crate::placement::{Placement, Round, RoundLimits, Rounds, rounds};

/// A migration under way: a round's experts travel while the placement before it serves, and switch as soon as the last is
/// there.
#[derive(Debug, Clone)]
pub(super) struct Migration {
    rounds: Rounds,
    /// The round that travels, and how long it takes.
    travelling: Option<(Round, f64)>,
    /// How long it has been under way.
    travelled_us: f64,
    arrival_us: f64,
    /// Experts that travel in all.
    pub arrivals: u64,
}

impl Migration {
    /// Plans the order. `gains` is what each layer wins; any unit, `[layers]`.
    pub fn new(
        current: &Placement,
        target: &Placement,
        gains: &[f64],
        limits: RoundLimits,
        cost: &CostModel,
    ) -> Migration {
        let rounds = rounds(current, target, gains, limits);
        let arrivals = rounds.arrivals_left() as u64;
        let arrival_us = cost.migration_us(1);
        let mut migration = Migration { rounds, travelling: None, travelled_us: 0.0, arrival_us, arrivals };
        migration.depart();
        migration
    }

    /// Sends the next round on its way.
    fn depart(&mut self) {
        self.travelling = self.rounds.next().map(|round| {
            let us = most_to_one_rank(&round) as f64 * self.arrival_us;
            (round, us)
        });
    }

    /// Layers that are not yet as they are to be.
    pub fn layers_in_flight(&self) -> usize {
        match &self.travelling {
            None => 0,
            Some((round, _)) => {
                let target = self.rounds.target();
                let now = |layer: &usize| round.arrivals.iter().any(|arrival| arrival.layer == *layer);
                let later =
                    |layer: usize| round.placement.layer(layer).slots() != target.layer(layer).slots();
                (0..target.layers()).filter(|layer| now(layer) || later(*layer)).count()
            }
        }
    }

    /// All rounds have switched.
    pub fn is_over(&self) -> bool {
        self.travelling.is_none()
    }

    /// Time that all rounds take, in microseconds.
    pub fn us(&self) -> f64 {
        let first = self.travelling.as_ref().map_or(0.0, |(_, us)| *us);
        first
            + self.rounds.clone().map(|round| most_to_one_rank(&round) as f64 * self.arrival_us).sum::<f64>()
    }

    /// Lets time pass; rounds that have arrived switch. Returns how many layers did, each as often as it did.
    pub fn advance(&mut self, us: f64, current: &mut Placement) -> usize {
        self.travelled_us += us;
        let mut switched = 0;
        while let Some((round, us)) = self.travelling.take_if(|(_, us)| *us <= self.travelled_us) {
            self.travelled_us -= us;
            let changed =
                |layer: &usize| current.layer(*layer).slots() != round.placement.layer(*layer).slots();
            switched += (0..current.layers()).filter(changed).count();
            *current = round.placement;
            self.depart();
        }
        switched
    }
}

/// Experts that the rank receives which receives most.
fn most_to_one_rank(round: &Round) -> usize {
    let mut received = vec![0; round.placement.ranks()];
    for arrival in &round.arrivals {
        received[arrival.slot / round.placement.slots_per_rank()] += 1;
    }
    received.into_iter().max().unwrap_or(0)
}
