//! Where step time is lost to imbalance, cause by cause.
//!
//! The slowest rank's experts, summed over layers, take `actual`. Five levels lie below, each what is left when one more
//! cause is removed; the causes are the distances between them, so they add up to the whole loss:
//! ```text
//! actual     as simulated
//! split      the best split of the same placement, batch by batch
//! placement  the best split of a placement with as many slots that was planned on these very tokens
//! noise      the same if every batch were an exact sample of all tokens
//! slots      (or structure, when there are slots enough) every rank has as much to do as any other
//! ```
//! The causes are reported in the order in which nobody to everybody could act on them: sampling noise first.

use super::migration::Migration;
use crate::cost::CostModel;
use crate::load::LoadWindow;
use crate::placement::{LayerPlacement, Placement, transfers};
use crate::report::data::{Loss, Run};
use crate::split::Shares;

/// Part of the step time below which nobody should act.
const WORTH_A_WORD: f64 = 5e-4;

/// A placement planned with hindsight.
#[derive(Debug, Clone)]
pub struct Reference {
    placement: Placement,
    /// `[layers]`: the most loaded rank over the mean, under the best split of all tokens together.
    stretch: Vec<f64>,
}

/// The levels, in microseconds over all layers and steps.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Levels {
    /// As simulated.
    pub actual: f64,
    /// Under the best split.
    pub best_split: f64,
    /// Under the best split of the placement with hindsight.
    pub hindsight: f64,
    /// The same without sampling noise.
    pub expected: f64,
    /// Evenly spread.
    pub even: f64,
}

impl Reference {
    /// `load` is that of the tokens that will be run, on which the placement was planned.
    pub fn new(placement: Placement, load: &LoadWindow) -> Reference {
        let mut shares = Shares::default();
        let stretch = (0..placement.layers()).map(|layer| {
            let counts: Vec<u64> = load.totals(layer).collect();
            let layer = placement.layer(layer);
            let mean = counts.iter().map(|&n| n as f64).sum::<f64>() / layer.ranks() as f64;
            match shares.optimum(layer, &counts) {
                Ok(optimum) if mean > 0.0 => optimum.max_load / mean,
                _ => 1.0,
            }
        });
        let stretch = stretch.collect();
        Reference { placement, stretch }
    }

    /// One layer of the placement, and how far its most loaded rank is above the mean.
    pub fn layer(&self, layer: usize) -> (LayerPlacement<'_>, f64) {
        (self.placement.layer(layer), self.stretch[layer])
    }
}

/// The causes as shares of the step time. `first` is the placement the run began with.
pub(super) fn losses(
    run: &Run,
    levels: &Levels,
    reference: &Reference,
    first: &Placement,
    cost: &CostModel,
) -> Vec<Loss> {
    let steps = run.totals.steps.max(1) as f64;
    let whole = run.totals.step_us * steps;
    // A placement planned with hindsight may lose to one that was not, by luck: then nothing is lost to placement.
    let split = levels.best_split.min(levels.actual);
    let hindsight = levels.hindsight.min(split);
    let expected = levels.expected.min(hindsight);
    let even = levels.even.min(expected);
    let moved = transfers(first, &reference.placement).len();
    let even_gain = vec![0.0; first.layers()];
    let moving_us = Migration::new(first, reference.placement.clone(), &even_gain, cost).us();
    let (experts, ranks) = (first.experts(), first.ranks());
    let enough = experts + ranks;
    let short = first.slots() < enough;
    let more_slots = enough.next_multiple_of(ranks).saturating_sub(first.slots());
    let memory = (more_slots / ranks * first.layers()) as f64 * cost.expert_bytes();
    let worth_a_word = WORTH_A_WORD * whole;
    let parts = [
        (
            "sampling noise",
            hindsight - expected,
            "larger batches, or several in flight".to_owned(),
            None,
            None,
        ),
        (
            "split",
            levels.actual - split,
            "the exact split: counts of all ranks before dispatch".to_owned(),
            None,
            None,
        ),
        (
            "placement",
            split - hindsight,
            format!(
                "a placement for this traffic: {moved} experts move, of {} slots",
                first.slots() * first.layers()
            ),
            Some(moved as f64 * cost.expert_bytes()),
            None,
        ),
        (
            "slots",
            if short { expected - even } else { 0.0 },
            format!("{more_slots} more slots per layer: {experts} experts + {ranks} ranks balance any load"),
            None,
            short.then_some(memory),
        ),
        (
            "structure",
            if short { 0.0 } else { expected - even },
            "whole copies on whole ranks do not divide evenly: nothing to be done".to_owned(),
            None,
            None,
        ),
    ];
    parts
        .into_iter()
        .map(|(cause, us, remedy, moved_bytes, memory_bytes)| Loss {
            cause: cause.to_owned(),
            share: if whole > 0.0 { us / whole } else { 0.0 },
            us: us / steps,
            remedy: if us > worth_a_word { remedy } else { "hardly anything is lost here".to_owned() },
            moved_bytes: moved_bytes.filter(|_| us > worth_a_word),
            moving_us: moved_bytes.filter(|_| us > worth_a_word).map(|_| moving_us),
            memory_bytes: memory_bytes.filter(|_| us > worth_a_word),
        })
        .collect()
}
