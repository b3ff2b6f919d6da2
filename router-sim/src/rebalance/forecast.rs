//! What load costs under a placement, and what a decision was made from.

use std::collections::BTreeMap;

use crate::Result;
use crate::bounds;
use crate::load::{LoadWindow, Phase, balancedness};
use crate::placement::{LayerPlacement, Placement};
use crate::split::{Shares, Split};

/// Rows of a layer, prefill and decode; of a sum of steps.
type PhaseRows = [f64; 2];

/// The figures of a decision. Balancedness is the mean over layers, under the run's split.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Forecast {
    /// Of the window under the placement in force.
    pub balance_before: f64,
    /// Of the window under the placement that was planned; the same as before when nothing was.
    pub balance_after: f64,
    /// The best that any placement with as many slots allows on the window.
    pub balance_bound: f64,
    /// Imbalance ratio that chance leaves at the batch size of the window's mean step, mean over layers.
    pub sampling_floor: f64,
    /// What the plan saves per step, in microseconds.
    pub gain_us_per_step: f64,
    /// For how many steps the gain is expected to last; 0 where that was not asked.
    pub horizon_steps: f64,
    /// What moving costs, in microseconds.
    pub cost_us: f64,
    /// Experts that travel.
    pub moves: u64,
    /// Their bytes.
    pub bytes: f64,
    /// What the placement of the last migration makes of the load that came since.
    pub achieved: Option<f64>,
    /// The part of its promise that the last migration kept on that load.
    pub kept: Option<f64>,
}

impl Forecast {
    /// As a trace keeps it.
    pub fn to_map(&self) -> BTreeMap<String, f64> {
        let entries = [
            ("balance_before_ratio", Some(self.balance_before)),
            ("balance_after_ratio", Some(self.balance_after)),
            ("balance_bound_ratio", Some(self.balance_bound)),
            ("sampling_floor_ratio", Some(self.sampling_floor)),
            ("gain_us_per_step", Some(self.gain_us_per_step)),
            ("horizon_steps", Some(self.horizon_steps)),
            ("cost_us", Some(self.cost_us)),
            ("moves", Some(self.moves as f64)),
            ("moved_bytes", Some(self.bytes)),
            ("achieved_balance_ratio", self.achieved),
            ("kept_ratio", self.kept),
        ];
        entries.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }
}

/// Asks what load costs under placements.
pub(super) struct Forecaster {
    split: Split,
    row_us: [f64; 2],
    shares: Shares,
}

/// One layer of a load under two placements, in microseconds over all its steps.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LayerGain {
    /// What it costs under the first.
    pub before: f64,
    /// What the second saves; less than 0 when it costs more.
    pub gain: f64,
}

impl Forecaster {
    pub fn new(split: Split, row_us: [f64; 2]) -> Self {
        Forecaster { split, row_us, shares: Shares::default() }
    }

    /// What each layer of a load costs under one placement, and saves under another; `[layers]`.
    pub fn gains(&mut self, load: &LoadWindow, from: &Placement, to: &Placement) -> Result<Vec<LayerGain>> {
        (0..load.layers())
            .map(|layer| {
                let before = self.slowest(load, layer, from.layer(layer))?;
                let chance = chance(load, layer, from.ranks());
                let mut gain = LayerGain { before: self.us(before), gain: 0.0 };
                if from.layer(layer).slots() != to.layer(layer).slots() {
                    let after = self.slowest(load, layer, to.layer(layer))?;
                    let promised = [0, 1].map(|p| after[p].max(chance[p].min(before[p])));
                    gain.gain = gain.before - self.us(promised);
                }
                Ok(gain)
            })
            .collect()
    }

    /// What a load costs under a placement, in microseconds.
    pub fn cost_us(&mut self, load: &LoadWindow, placement: &Placement) -> Result<f64> {
        let mut sum = 0.0;
        for layer in 0..load.layers() {
            let slowest = self.slowest(load, layer, placement.layer(layer))?;
            sum += self.us(slowest);
        }
        Ok(sum)
    }

    /// Mean balancedness of a load, both phases together.
    pub fn balance(&mut self, load: &LoadWindow, placement: &Placement) -> Result<f64> {
        let mut sum = 0.0;
        for layer in 0..load.layers() {
            let counts: Vec<u64> = load.totals(layer).collect();
            sum += balancedness(&self.rank_loads(placement.layer(layer), &counts)?);
        }
        Ok(sum / load.layers().max(1) as f64)
    }

    fn us(&self, rows: PhaseRows) -> f64 {
        rows[0] * self.row_us[0] + rows[1] * self.row_us[1]
    }

    /// Rows of the slowest rank in each phase.
    fn slowest(
        &mut self,
        load: &LoadWindow,
        layer: usize,
        placement: LayerPlacement<'_>,
    ) -> Result<PhaseRows> {
        let mut rows = [0.0; 2];
        for (phase, rows) in Phase::ALL.into_iter().zip(&mut rows) {
            let loads = self.rank_loads(placement, load.counts(phase, layer))?;
            *rows = loads.iter().copied().max().unwrap_or(0) as f64;
        }
        Ok(rows)
    }

    fn rank_loads(&mut self, layer: LayerPlacement<'_>, counts: &[u64]) -> Result<Vec<u64>> {
        self.shares.rank_loads(self.split, layer, counts)
    }
}

/// What the slowest rank gets in each phase by chance alone, however good the placement.
fn chance(load: &LoadWindow, layer: usize, ranks: usize) -> PhaseRows {
    Phase::ALL.map(|phase| {
        let rows: u64 = load.counts(phase, layer).iter().sum();
        rows as f64 / ranks as f64 * (1.0 + bounds::sampling_floor(rows, ranks))
    })
}

/// Mean over layers of the best balancedness that any placement with as many slots allows.
pub(super) fn balance_bound(load: &LoadWindow, placement: &Placement) -> f64 {
    let of_layer = |layer: usize| {
        let counts: Vec<u64> = load.totals(layer).collect();
        let mean = bounds::mean_load(&counts, placement.ranks());
        match bounds::replica_bound(&counts, placement.ranks(), placement.slots()) {
            bound if bound > 0.0 => mean / bound,
            _ => 1.0,
        }
    };
    (0..load.layers()).map(of_layer).sum::<f64>() / load.layers().max(1) as f64
}

/// Mean over layers of the sampling floor at the batch size of a mean step.
pub(super) fn sampling_floor(load: &LoadWindow, steps: u64, ranks: usize) -> f64 {
    let of_layer =
        |layer: usize| bounds::sampling_floor(load.totals(layer).sum::<u64>() / steps.max(1), ranks);
    (0..load.layers()).map(of_layer).sum::<f64>() / load.layers().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(prefill: &[u64], decode: &[u64]) -> LoadWindow {
        let mut load = LoadWindow::new(&[0], prefill.len());
        load.counts_mut(Phase::Prefill, 0).copy_from_slice(prefill);
        load.counts_mut(Phase::Decode, 0).copy_from_slice(decode);
        load
    }

    fn placement(slots: &[i32]) -> Placement {
        Placement::new(2, slots.len() / 2, 4, vec![0], vec![slots.to_vec()]).unwrap()
    }

    #[test]
    fn cost_is_the_slowest_rank_of_each_phase() {
        let load = load(&[70_000, 10_000, 10_000, 10_000], &[1000, 1000, 1000, 5000]);
        let (linear, crossed) = (placement(&[0, 1, 2, 3]), placement(&[0, 2, 3, 1]));
        let mut forecaster = Forecaster::new(Split::Even, [2.0, 3.0]);
        // Prefill: 80,000 on rank 0; decode: 6000 on rank 1, both times.
        assert_eq!(forecaster.cost_us(&load, &linear).unwrap(), 160_000.0 + 18_000.0);
        let gains = forecaster.gains(&load, &linear, &crossed).unwrap();
        assert_eq!((gains[0].before, gains[0].gain), (178_000.0, 0.0));
        // A second copy of expert 0 on rank 1 halves it: 45,000 + 10,000 on rank 0.
        let (from, to) = (placement(&[0, 1, -1, 2, 3, -1]), placement(&[0, 1, -1, 2, 3, 0]));
        let gains = forecaster.gains(&load, &from, &to).unwrap();
        // Even split: rank 1 gets 35,000 + 20,000 of prefill, 500 + 6000 of decode.
        assert_eq!(gains[0].gain, 2.0 * (80_000.0 - 55_000.0) - 3.0 * 500.0);
        let balance = forecaster.balance(&load, &from).unwrap();
        assert!((balance - 108_000.0 / 2.0 / 82_000.0).abs() < 1e-12, "{balance}");
        let bound = balance_bound(&load, &to);
        assert_eq!(bound, 1.0);
        assert!(balance_bound(&load, &linear) < 1.0, "whole experts");
    }

    #[test]
    fn chance_promises_nothing() {
        // Sixteen tokens: the imbalance of 10 to 6 is what chance leaves.
        let few = load(&[5, 5, 3, 3], &[0; 4]);
        let (from, to) = (placement(&[0, 1, 2, 3]), placement(&[0, 2, 1, 3]));
        let mut forecaster = Forecaster::new(Split::Exact, [1.0, 1.0]);
        let gains = forecaster.gains(&few, &from, &to).unwrap();
        assert!(gains[0].gain < 1.0, "{gains:?}");
        let many = load(&[5000, 5000, 3000, 3000], &[0; 4]);
        let gains = forecaster.gains(&many, &from, &to).unwrap();
        assert!((1900.0..2000.0).contains(&gains[0].gain), "{gains:?}");
    }
}
