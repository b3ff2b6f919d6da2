//! What moving a limited number of experts brings: balance against bytes.

use crate::Result;
use crate::load::{LoadWindow, balancedness};
use crate::placement::{ClusterShape, Placement, PlanOptions, PolicyName, plan, transfers};
use crate::report::data::ParetoPoint;
use crate::split::{Shares, Split, even_rank_loads};

/// Transfers per layer that are tried, and at last a plan from scratch.
const LIMITS: [usize; 7] = [0, 1, 2, 4, 8, 16, 32];

/// Changes `current` for `load` with more and more transfers per layer, and from scratch. Balancedness is the mean over
/// layers for the whole load, under the best split when `split` is the exact one, else evenly shared out.
///
/// # Errors
/// Those of the policy.
pub fn pareto(
    policy: PolicyName,
    current: &Placement,
    load: &LoadWindow,
    split: Split,
    expert_bytes: f64,
) -> Result<Vec<ParetoPoint>> {
    let shape = ClusterShape { ranks: current.ranks(), redundant: current.slots() - current.experts() };
    let limits = LIMITS.into_iter().map(Some).chain([None]);
    let mut points: Vec<ParetoPoint> = Vec::new();
    for limit in limits {
        let target = match limit {
            Some(0) => current.clone(),
            _ => {
                let options = PlanOptions { max_transfers: limit, ..PlanOptions::default() };
                plan(policy, std::slice::from_ref(load), &shape, Some(current), options)?
            }
        };
        let moved = transfers(current, &target).len() as f64;
        points.push(ParetoPoint {
            label: limit.map_or("from scratch".to_owned(), |limit| format!("{limit} per layer")),
            transfers_per_layer: moved / target.layers() as f64,
            bytes: moved * expert_bytes,
            balancedness: balance(&target, load, split),
            best: false,
        });
    }
    points.sort_by(|a, b| a.bytes.total_cmp(&b.bytes).then(b.balancedness.total_cmp(&a.balancedness)));
    let mut reached = f64::NEG_INFINITY;
    for point in &mut points {
        point.best = point.balancedness > reached;
        reached = reached.max(point.balancedness);
    }
    Ok(points)
}

/// Mean over layers.
fn balance(placement: &Placement, load: &LoadWindow, split: Split) -> f64 {
    let mut shares = Shares::default();
    let mut of_layer = |layer: usize| {
        let counts: Vec<u64> = load.totals(layer).collect();
        let layer = placement.layer(layer);
        let mean = counts.iter().map(|&n| n as f64).sum::<f64>() / layer.ranks() as f64;
        match (split, shares.optimum(layer, &counts)) {
            (Split::Exact, Ok(optimum)) if optimum.max_load > 0.0 => mean / optimum.max_load,
            _ => balancedness(&even_rank_loads(layer, &counts)),
        }
    };
    (0..placement.layers()).map(&mut of_layer).sum::<f64>() / placement.layers().max(1) as f64
}
