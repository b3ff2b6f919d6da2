//! Where step time is lost to imbalance, cause by cause.
//!
//! The slowest rank's experts, summed over layers, take `actual`. Levels lie below, each what is left when one more cause
//! is removed; the causes are the distances between them, so they add up to the whole loss:
//! ```text
//! actual     as simulated
//! split      the best split of the same placement, batch by batch
//! placement  the best split of a placement with as many slots, under the same rules, that was planned on these very tokens
//! noise      the same if every batch were an exact sample of all tokens
//! structure  the same without the rule that groups of experts stay on a node; nothing where there is no such rule
//! slots      (or structure, when there are slots enough) every rank has as much to do as any other
//! ```
//! The causes are reported in the order in which nobody to everybody could act on them: sampling noise first.

use crate::bounds::{group_on_node_bound, mean_load};
use crate::cost::CostModel;
use crate::load::LoadWindow;
use crate::placement::{LayerPlacement, Placement, arrivals, transfers};
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
    /// Where the placement keeps groups of experts on nodes: what it costs to do so.
    rule: Option<GroupRule>,
}

/// The rule that groups of experts stay whole on a node.
#[derive(Debug, Clone)]
struct GroupRule {
    nodes: usize,
    /// Planned without it.
    unruled: Placement,
    /// `[layers]`: as [`Reference::stretch`], without the rule.
    stretch: Vec<f64>,
    /// `[layers]`: the best balancedness under the rule; `None` with too many groups to search.
    bound: Option<Vec<f64>>,
}

/// One layer of a [`Reference`].
#[derive(Debug, Clone, Copy)]
pub struct ReferenceLayer<'a> {
    /// Where experts are.
    pub placement: LayerPlacement<'a>,
    /// How far its most loaded rank is above the mean over all tokens: at least 1.
    pub stretch: f64,
    /// The same without the rule that groups of experts stay on a node; the same number where there is none.
    pub unruled_stretch: f64,
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
    /// The same without the rule that groups of experts stay on a node.
    pub unruled: f64,
    /// Evenly spread.
    pub even: f64,
}

impl Reference {
    /// `load` is that of the tokens that will be run, on which the placement was planned.
    pub fn new(placement: Placement, load: &LoadWindow) -> Reference {
        let stretch = stretch(&placement, load);
        Reference { placement, stretch, rule: None }
    }

    /// For a placement that keeps `groups` of consecutive experts whole on `nodes`: also looks at one that does not,
    /// `unruled`, planned on the same load for as many slots.
    #[must_use]
    pub fn without_rule(
        self,
        unruled: Placement,
        load: &LoadWindow,
        groups: usize,
        nodes: usize,
    ) -> Reference {
        let ranks = unruled.ranks();
        let bound = (0..unruled.layers()).map(|layer| {
            let counts: Vec<u64> = load.totals(layer).collect();
            let max = group_on_node_bound(&counts, ranks, groups, nodes).ok()?;
            Some(if max > 0.0 { mean_load(&counts, ranks) / max } else { 1.0 })
        });
        let bound = bound.collect();
        let stretch = stretch(&unruled, load);
        Reference { rule: Some(GroupRule { nodes, unruled, stretch, bound }), ..self }
    }

    /// One layer.
    pub fn layer(&self, layer: usize) -> ReferenceLayer<'_> {
        let stretch = self.stretch[layer];
        ReferenceLayer {
            placement: self.placement.layer(layer),
            stretch,
            unruled_stretch: self.rule.as_ref().map_or(stretch, |rule| rule.stretch[layer]),
        }
    }

    /// The best balancedness of all tokens together that the rule of groups on nodes allows in a layer.
    pub(super) fn group_bound(&self, layer: usize) -> Option<f64> {
        Some(self.rule.as_ref()?.bound.as_ref()?[layer])
    }
}

/// How far each layer's most loaded rank is above the mean under the best split of a load; `[layers]`.
fn stretch(placement: &Placement, load: &LoadWindow) -> Vec<f64> {
    let mut shares = Shares::default();
    let stretch = (0..placement.layers()).map(|layer| {
        let counts: Vec<u64> = load.totals(layer).collect();
        let layer = placement.layer(layer);
        let mean = mean_load(&counts, layer.ranks());
        match shares.optimum(layer, &counts) {
            Ok(optimum) if mean > 0.0 => optimum.max_load / mean,
            _ => 1.0,
        }
    });
    stretch.collect()
}

/// What it takes to get from one placement to another.
#[derive(Debug, Clone, Copy)]
struct Move {
    experts: usize,
    bytes: f64,
    us: f64,
}

impl Move {
    fn between(from: &Placement, to: &Placement, cost: &CostModel) -> Move {
        let experts = transfers(from, to).len();
        // Layer by layer, each as long as the rank takes that receives most.
        let most = |layer: usize| arrivals(from.layer(layer), to.layer(layer)).into_iter().max().unwrap_or(0);
        let us = (0..from.layers()).map(|layer| cost.migration_us(most(layer))).sum();
        Move { experts, bytes: experts as f64 * cost.expert_bytes(), us }
    }
}

impl GroupRule {
    /// How to be rid of it, and what that costs.
    fn remedy(&self, run: &Run, moved: usize) -> String {
        let bound = run.totals.group_bound;
        let bound = bound.map_or(String::new(), |bound| format!(", which allows {bound:.4} at best"));
        let token_layers = (run.totals.tokens * run.layers.len() as u64).max(1) as f64;
        format!(
            "drop the groups-on-nodes rule{bound}: {moved} experts move, and a token may visit up to {} nodes instead of {:.2}",
            self.nodes,
            run.traffic.node_pairs as f64 / token_layers
        )
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
    let unruled = levels.unruled.min(expected);
    let even = levels.even.min(unruled);
    let moved = Move::between(first, &reference.placement, cost);
    let (experts, ranks) = (first.experts(), first.ranks());
    let enough = experts + ranks;
    let short = first.slots() < enough;
    let more_slots = enough.next_multiple_of(ranks).saturating_sub(first.slots());
    let memory = (more_slots / ranks * first.layers()) as f64 * cost.expert_bytes();
    let structure = match &reference.rule {
        // Most of it, at least.
        Some(rule) if expected - unruled >= unruled - even || short => {
            let dropped = Move::between(first, &rule.unruled, cost);
            (rule.remedy(run, dropped.experts), Some(dropped))
        }
        _ => ("whole copies on whole ranks do not divide evenly: nothing to be done".to_owned(), None),
    };
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
                "a placement for this traffic: {} experts move, of {} slots",
                moved.experts,
                first.slots() * first.layers()
            ),
            Some(moved),
            None,
        ),
        (
            "slots",
            if short { unruled - even } else { 0.0 },
            format!("{more_slots} more slots per layer: {experts} experts + {ranks} ranks balance any load"),
            None,
            short.then_some(memory),
        ),
        ("structure", expected - if short { unruled } else { even }, structure.0, structure.1, None),
    ];
    parts
        .into_iter()
        .map(|(cause, us, remedy, moved, memory_bytes)| Loss {
            cause: cause.to_owned(),
            share: if whole > 0.0 { us / whole } else { 0.0 },
            us: us / steps,
            remedy: if us > worth_a_word { remedy } else { "hardly anything is lost here".to_owned() },
            moved_bytes: moved.filter(|_| us > worth_a_word).map(|moved| moved.bytes),
            moving_us: moved.filter(|_| us > worth_a_word).map(|moved| moved.us),
            memory_bytes: memory_bytes.filter(|_| us > worth_a_word),
        })
        .collect()
}
