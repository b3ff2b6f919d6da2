//! One MoE layer of the simulation: what a step made of it, and the sums over steps.

use super::best::BestSplit;
use super::losses::ReferenceLayer;
use super::spread::Spread;
use super::tally::{LayerTally, OwnedRows};
use crate::cost::{CostModel, Endpoints, WireUnit};
use crate::placement::LayerPlacement;
use crate::report::data::LayerFigures;
use crate::split::{Split, SplitPlan};

/// What one step made of one layer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LayerStep {
    /// Rows over all ranks: tokens times top-k.
    pub rows: u64,
    /// Rows of the most loaded rank.
    pub max_rows: u64,
    /// The same under the best split that the placement allows.
    pub best_max_rows: u64,
    /// The same under the best placement with as many slots: no placement and no split gets below.
    pub bound_max_rows: u64,
    /// Slots that got rows, over all ranks.
    pub activated: u64,
    /// The same on the rank that had most.
    pub max_activated: u64,
    /// Dispatch, in microseconds.
    pub dispatch_us: f64,
    /// The slowest rank's experts, in microseconds.
    pub expert_us: f64,
    /// Combine, in microseconds.
    pub combine_us: f64,
    /// What the slowest rank's experts would take under the best split.
    pub best_expert_us: f64,
    /// The same under the best split of a placement planned with hindsight; 0 without one.
    pub hindsight_expert_us: f64,
    /// The same if the batch were an exact sample of all tokens.
    pub expected_expert_us: f64,
    /// The same without the rule that groups of experts stay on a node, where there is one.
    pub unruled_expert_us: f64,
    /// The same if rows and activated slots were spread evenly.
    pub even_expert_us: f64,
}

impl LayerStep {
    /// Mean over maximum of the ranks' rows.
    pub fn actual(&self, ranks: usize) -> f64 {
        balance(self.rows, self.max_rows, ranks)
    }

    /// The same under the best split.
    pub fn best_split(&self, ranks: usize) -> f64 {
        balance(self.rows, self.best_max_rows, ranks)
    }

    /// The same under the best placement with as many slots.
    pub fn bound(&self, ranks: usize) -> f64 {
        balance(self.rows, self.bound_max_rows, ranks)
    }

    /// Critical path of exchanges and experts, in microseconds.
    pub fn us(&self) -> f64 {
        self.dispatch_us + self.expert_us + self.combine_us
    }
}

fn balance(rows: u64, max: u64, ranks: usize) -> f64 {
    if rows == 0 { 1.0 } else { (rows as f64 / (max as f64 * ranks as f64)).min(1.0) }
}

/// What a thread needs to work on a layer; reused for all layers it works on.
#[derive(Debug, Clone)]
pub(super) struct Worker {
    pub tally: LayerTally,
    split: SplitPlan,
    best: BestSplit,
    endpoints: Endpoints,
    pub traffic: TrafficSums,
}

/// Sums over all layers and steps of a worker.
#[derive(Debug, Clone, Default)]
pub(super) struct TrafficSums {
    /// Rows from each rank to each rank; `[ranks][ranks]`.
    pub rows: Vec<u64>,
    pub local_rows: u64,
    pub all_rows: u64,
    pub rank_pairs: u64,
    pub node_pairs: u64,
    pub remote_node_pairs: u64,
}

/// Sums over the steps of one layer.
#[derive(Debug, Clone, Default)]
pub(super) struct Lane {
    pub last: LayerStep,
    pub actual: Spread,
    best_split: f64,
    bound: f64,
    sums: LayerStep,
    steps: u64,
    ranks: usize,
    pub rank_rows: Vec<u64>,
    pub expert_tokens: Vec<u64>,
}

impl Worker {
    pub fn new(split: Split, endpoints: Endpoints, ranks: usize) -> Self {
        Worker {
            tally: LayerTally::default(),
            split: SplitPlan::new(split),
            best: BestSplit::default(),
            endpoints,
            traffic: TrafficSums { rows: vec![0; ranks * ranks], ..TrafficSums::default() },
        }
    }

    /// Runs one layer of one step. `reference` is the same layer of what was planned with hindsight.
    pub fn run(
        &mut self,
        lane: &mut Lane,
        layer: LayerPlacement<'_>,
        cost: &CostModel,
        owned: OwnedRows<'_>,
        ids: &[u16],
        reference: Option<ReferenceLayer<'_>>,
    ) {
        self.tally.count(layer, &mut self.split, owned, ids);
        let tally = &self.tally;
        let mut step = LayerStep { rows: ids.len() as u64, ..LayerStep::default() };
        for (rank, (rows, activated)) in tally.per_rank().enumerate() {
            step.max_rows = step.max_rows.max(rows);
            step.activated += activated;
            step.max_activated = step.max_activated.max(activated);
            step.expert_us = step.expert_us.max(cost.experts_us(rows, activated));
            lane.rank_rows[rank] += rows;
        }
        for (sum, &tokens) in lane.expert_tokens.iter_mut().zip(&tally.expert_tokens) {
            *sum += tokens;
        }
        let units = if cost.unit() == WireUnit::Row { &tally.rows } else { &tally.rank_pairs };
        self.endpoints.count(cost.unit(), units, &tally.node_pairs);
        (step.dispatch_us, step.combine_us) = cost.exchanges_us(&self.endpoints);
        let ranks = layer.ranks() as u64;
        let mean_rows = step.rows.div_ceil(ranks);
        let mean_activated = step.activated.div_ceil(ranks);
        (step.best_max_rows, step.bound_max_rows) = self.best.of(layer, &tally.expert_tokens, step.max_rows);
        let us = |rows| cost.experts_us(rows, mean_activated).min(step.expert_us);
        step.best_expert_us = us(step.best_max_rows);
        step.even_expert_us = us(mean_rows);
        if let Some(ReferenceLayer { placement, stretch, unruled_stretch }) = reference {
            let stretched = |stretch: f64| us((step.rows as f64 / ranks as f64 * stretch).ceil() as u64);
            step.hindsight_expert_us = us(self.best.max_rows(placement, &tally.expert_tokens));
            step.expected_expert_us = stretched(stretch);
            step.unruled_expert_us = stretched(unruled_stretch);
        }
        self.traffic.add(tally, &self.endpoints, layer.ranks());
        lane.add(step);
    }
}

impl TrafficSums {
    fn add(&mut self, tally: &LayerTally, endpoints: &Endpoints, ranks: usize) {
        for (sum, &n) in self.rows.iter_mut().zip(&tally.rows) {
            *sum += u64::from(n);
        }
        for source in 0..ranks {
            let rows = &tally.rows[source * ranks..(source + 1) * ranks];
            self.local_rows += u64::from(rows[source]);
            self.all_rows += rows.iter().map(|&n| u64::from(n)).sum::<u64>();
            let pairs = &tally.rank_pairs[source * ranks..(source + 1) * ranks];
            self.rank_pairs += pairs.iter().map(|&n| u64::from(n)).sum::<u64>();
            let nodes = endpoints.nodes();
            let pairs = &tally.node_pairs[source * nodes..(source + 1) * nodes];
            let all: u64 = pairs.iter().map(|&n| u64::from(n)).sum();
            self.node_pairs += all;
            self.remote_node_pairs += all - u64::from(pairs[endpoints.node_of(source)]);
        }
    }

    /// Adds another worker's sums.
    pub fn merge(&mut self, other: &TrafficSums) {
        for (sum, n) in self.rows.iter_mut().zip(&other.rows) {
            *sum += n;
        }
        self.local_rows += other.local_rows;
        self.all_rows += other.all_rows;
        self.rank_pairs += other.rank_pairs;
        self.node_pairs += other.node_pairs;
        self.remote_node_pairs += other.remote_node_pairs;
    }
}

impl Lane {
    pub fn new(ranks: usize, experts: usize) -> Self {
        Lane { ranks, rank_rows: vec![0; ranks], expert_tokens: vec![0; experts], ..Lane::default() }
    }

    fn add(&mut self, step: LayerStep) {
        self.last = step;
        self.steps += 1;
        self.actual.add(step.actual(self.ranks));
        self.best_split += step.best_split(self.ranks);
        self.bound += step.bound(self.ranks);
        let sums = &mut self.sums;
        sums.rows += step.rows;
        sums.max_rows += step.max_rows;
        sums.activated += step.activated;
        sums.max_activated += step.max_activated;
        for (sum, us) in [
            (&mut sums.dispatch_us, step.dispatch_us),
            (&mut sums.expert_us, step.expert_us),
            (&mut sums.combine_us, step.combine_us),
            (&mut sums.best_expert_us, step.best_expert_us),
            (&mut sums.hindsight_expert_us, step.hindsight_expert_us),
            (&mut sums.expected_expert_us, step.expected_expert_us),
            (&mut sums.unruled_expert_us, step.unruled_expert_us),
            (&mut sums.even_expert_us, step.even_expert_us),
        ] {
            *sum += us;
        }
    }

    /// Sums over steps.
    pub fn sums(&self) -> &LayerStep {
        &self.sums
    }

    /// The layer's line in a report. `plan` is the balancedness it was planned for.
    pub fn figures(&self, layer_id: usize, plan: f64) -> LayerFigures {
        let steps = self.steps.max(1) as f64;
        LayerFigures {
            layer_id,
            plan,
            actual: self.actual.mean(),
            actual_p5: self.actual.percentile(0.05),
            best_split: if self.steps == 0 { 1.0 } else { self.best_split / steps },
            bound: if self.steps == 0 { 1.0 } else { self.bound / steps },
            group_bound: None,
            max_tokens: self.sums.max_rows as f64 / steps,
            activated: self.sums.activated as f64 / steps / self.ranks as f64,
            max_activated: self.sums.max_activated as f64 / steps,
            dispatch_us: self.sums.dispatch_us / steps,
            expert_us: self.sums.expert_us / steps,
            combine_us: self.sums.combine_us / steps,
        }
    }
}
