//! What a placement makes of a load: how evenly its ranks would be loaded.

use router_sim::bounds::replica_bound;
use router_sim::load::LoadWindow;
use router_sim::placement::Placement;
use router_sim::split::{Shares, Split};
use serde::Serialize;

/// Balancedness (mean rank load over the highest, the mean over layers) of two placements on the same load, with copies
/// shared out as the server does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Forecast {
    pub before: f64,
    pub after: f64,
    /// The best that any placement with as many slots allows.
    pub bound: f64,
    /// Part of the busiest ranks' rows that is saved; layers are as slow as their busiest rank.
    #[serde(skip)]
    pub gain: f64,
}

impl Forecast {
    /// `None` without tokens.
    pub fn of(
        load: &LoadWindow,
        split: Split,
        current: &Placement,
        target: &Placement,
    ) -> router_sim::Result<Option<Forecast>> {
        let mut shares = Shares::default();
        let (mut forecast, mut layers) = (Forecast { before: 0.0, after: 0.0, bound: 0.0, gain: 0.0 }, 0);
        let (mut slowest_before, mut slowest_after) = (0.0, 0.0);
        for layer in 0..load.layers() {
            let tokens: Vec<u64> = load.totals(layer).collect();
            let all = tokens.iter().map(|&n| n as f64).sum::<f64>();
            if all == 0.0 {
                continue;
            }
            let mean = all / current.ranks() as f64;
            let before = slowest(shares.rank_loads(split, current.layer(layer), &tokens)?);
            let after = slowest(shares.rank_loads(split, target.layer(layer), &tokens)?);
            forecast.before += mean / before;
            forecast.after += mean / after;
            forecast.bound += mean / replica_bound(&tokens, current.ranks(), current.slots());
            slowest_before += before;
            slowest_after += after;
            layers += 1;
        }
        if layers == 0 {
            return Ok(None);
        }
        let mean = |sum: f64| (sum / f64::from(layers) * 1e4).round() / 1e4;
        Ok(Some(Forecast {
            before: mean(forecast.before),
            after: mean(forecast.after),
            bound: mean(forecast.bound),
            gain: 1.0 - slowest_after / slowest_before,
        }))
    }
}

/// Rows of the busiest rank.
fn slowest(ranks: Vec<u64>) -> f64 {
    ranks.into_iter().max().unwrap_or(0) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::LoadSnapshot;

    #[test]
    fn what_a_copy_of_a_hot_expert_would_save() {
        let mut load = LoadSnapshot::zeros(vec![3], 3, 2);
        load.by_expert = vec![8, 1, 1, 2, 0, 0];
        let load = load.to_window();
        let placement = |map: [i32; 4]| Placement::new(2, 2, 3, vec![3], vec![map.to_vec()]).unwrap();
        let (current, target) = (placement([0, 1, 2, -1]), placement([0, 1, 2, 0]));
        let forecast = Forecast::of(&load, Split::Exact, &current, &target).unwrap().unwrap();
        assert_eq!((forecast.before, forecast.after, forecast.bound), (0.5455, 1.0, 1.0));
        assert!((forecast.gain - 5.0 / 11.0).abs() < 1e-12, "{forecast:?}");
        let nothing = LoadSnapshot::zeros(vec![3], 3, 2).to_window();
        assert_eq!(Forecast::of(&nothing, Split::Exact, &current, &target).unwrap(), None);
    }
}
