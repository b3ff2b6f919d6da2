//! The loop over steps.

use std::thread;

use super::lane::{Lane, LayerStep, Worker};
use super::losses::{Levels, Reference};
use super::rebalance::{Live, LiveRebalancing, Served};
use super::served::{Agreement, Follower, ServedRun};
use super::sources::{self, Sources};
use super::spread::Spread;
use super::tally::OwnedRows;
use super::timeline::Timeline;
use crate::cost::{CostModel, Endpoints};
use crate::load::{LoadWindow, Phase};
use crate::placement::{ClusterShape, Placement, PolicyName};
use crate::report::data::{Run, TimePoint, Totals, Traffic};
use crate::split::{Split, even_balancedness};
use crate::stream::{TokenBatch, TokenShape};
use crate::topology::Cluster;
use crate::{Error, Result};

/// Choices of a step above which its layers are worth sharing out among threads.
const CHOICES_PER_THREAD: usize = 1 << 18;
/// Ranks above which a report shows traffic between nodes instead.
const MOST_TRAFFIC_RANKS: usize = 64;

/// Everything about a run but its tokens.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Short name of the run.
    pub name: String,
    /// Policy that rebalancing plans with, and the name in reports.
    pub policy: PolicyName,
    /// Split between replicas.
    pub split: Split,
    /// Redundant slots per layer over all ranks.
    pub redundant: usize,
    /// Rebalancing while serving; `None` keeps the placement.
    pub rebalancing: Option<LiveRebalancing>,
    /// Which rank owns which row.
    pub sources: Sources,
    /// Threads; results do not depend on it.
    pub threads: usize,
}

/// What one step took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepFigures {
    /// Tokens of the step.
    pub tokens: u64,
    /// Critical path, stall included, in microseconds.
    pub us: f64,
    /// Waiting for moved weights after it, in microseconds.
    pub stall_us: f64,
}

/// A run under way.
pub struct Simulator<'a> {
    setup: &'a Setup,
    cost: &'a CostModel,
    top_k: usize,
    ranks_per_node: usize,
    recorded_sources: bool,
    placement: Placement,
    mover: Mover,
    reference: Option<&'a Reference>,
    lanes: Vec<Lane>,
    workers: Vec<Worker>,
    starts: Vec<usize>,
    timeline: Timeline,
    sums: Sums,
}

/// Who moves experts while the run goes on.
enum Mover {
    Nobody,
    /// The rebalancer, in modelled time.
    Live(Box<Live>),
    /// A recorded run.
    Recorded(Box<Follower>),
}

/// Sums over steps.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    steps: u64,
    tokens: u64,
    us: f64,
    other_us: f64,
    stall_us: f64,
}

impl<'a> Simulator<'a> {
    /// A run on `placement.ranks()` ranks of a cluster, beginning with this placement.
    ///
    /// # Errors
    /// [`Error::Impossible`] when the placement is for other experts or layers than the stream, or the stream's rows have
    /// no source ranks though they must.
    pub fn new(
        setup: &'a Setup,
        cluster: &Cluster,
        cost: &'a CostModel,
        shape: &TokenShape,
        placement: Placement,
    ) -> Result<Self> {
        if placement.experts() != shape.experts || placement.layer_ids() != shape.layer_ids {
            return Err(Error::Impossible(format!(
                "a placement of {} experts in layers {:?} for tokens of {} experts in layers {:?}",
                placement.experts(),
                placement.layer_ids(),
                shape.experts,
                shape.layer_ids
            )));
        }
        let ranks = placement.ranks();
        let worker = Worker::new(setup.split, Endpoints::new(cluster, ranks), ranks);
        let mover = match setup.rebalancing {
            None => Mover::Nobody,
            Some(settings) => {
                let shape_of_cluster = ClusterShape { ranks, redundant: setup.redundant };
                let (counts, per_node) = (shape.empty_window(), cluster.devices_per_node);
                let live = Live::new(settings, setup.policy, shape_of_cluster, setup.split, per_node, counts);
                Mover::Live(Box::new(live))
            }
        };
        Ok(Simulator {
            setup,
            cost,
            top_k: shape.top_k,
            ranks_per_node: cluster.devices_per_node,
            recorded_sources: setup.sources.are_recorded(shape, ranks)?,
            lanes: vec![Lane::new(ranks, shape.experts); shape.layers()],
            workers: vec![worker; setup.threads.clamp(1, shape.layers())],
            placement,
            mover,
            reference: None,
            starts: Vec::new(),
            timeline: Timeline::default(),
            sums: Sums::default(),
        })
    }

    /// Also computes what this placement would make of every batch; see [`Levels`].
    pub fn compare_with(&mut self, reference: &'a Reference) {
        self.reference = Some(reference);
    }

    /// Follows a recorded run from its first step on, instead of rebalancing by modelled time: its batches are to follow.
    ///
    /// # Panics
    /// When a batch has been run.
    pub fn follow(&mut self, run: ServedRun) {
        assert_eq!(self.sums.steps, 0, "a recorded run is followed from its beginning");
        self.placement = run.placement.clone();
        self.mover = Mover::Recorded(Box::new(Follower::new(run)));
    }

    /// Runs one batch.
    ///
    /// # Errors
    /// Those of a placement policy that rebalances.
    pub fn step(&mut self, batch: &TokenBatch) -> Result<StepFigures> {
        if let Mover::Recorded(follower) = &mut self.mover {
            follower.before_step(batch.step, &mut self.placement)?;
        }
        let ranks = self.placement.ranks();
        sources::fill_starts(batch, self.recorded_sources, ranks, &mut self.starts);
        self.run_layers(batch);
        let (mut moe_us, mut actual, mut best) = (0.0, 0.0, 0.0);
        for lane in &self.lanes {
            moe_us += lane.last.us();
            actual += lane.last.actual(ranks);
            best += lane.last.best_split(ranks);
        }
        let layers = self.lanes.len() as f64;
        let other_us = self.other_us(batch, layers);
        let serving_us = moe_us + other_us;
        let point = TimePoint {
            step: self.sums.steps,
            steps: 1,
            seconds: self.sums.us / 1e6,
            actual: actual / layers,
            best_split: best / layers,
            step_us: serving_us,
            layers_in_flight: match &self.mover {
                Mover::Nobody => 0,
                Mover::Live(live) => live.layers_in_flight(),
                Mover::Recorded(follower) => follower.layers_in_flight(),
            },
        };
        let stall_us = match &mut self.mover {
            Mover::Nobody => 0.0,
            Mover::Live(live) => {
                let served = Served { batch, us: serving_us, next: self.sums.steps + 1 };
                let layers = self.lanes.iter().map(|lane| &lane.last);
                live.after_step(served, layers, &mut self.placement, self.cost)?
            }
            Mover::Recorded(follower) => {
                follower.after_step(batch);
                0.0
            }
        };
        let us = serving_us + stall_us;
        self.timeline.push(TimePoint { step_us: us, ..point });
        let tokens = batch.rows.len() as u64;
        self.sums.steps += 1;
        self.sums.tokens += tokens;
        self.sums.us += us;
        self.sums.other_us += other_us;
        self.sums.stall_us += stall_us;
        Ok(StepFigures { tokens, us, stall_us })
    }

    /// Runs all layers, each by itself, on as many threads as pays.
    fn run_layers(&mut self, batch: &TokenBatch) {
        let layers = self.lanes.len();
        let owned =
            OwnedRows { starts: &self.starts, top_k: self.top_k, ranks_per_node: self.ranks_per_node };
        let (placement, cost, reference) = (&self.placement, self.cost, self.reference);
        let run = |worker: &mut Worker, first: usize, lanes: &mut [Lane]| {
            for (lane, layer) in lanes.iter_mut().zip(first..) {
                let reference = reference.map(|reference| reference.layer(layer));
                worker.run(lane, placement.layer(layer), cost, owned, batch.layer(layer, layers), reference);
            }
        };
        let threads = self.workers.len().min(batch.ids.len() / CHOICES_PER_THREAD).max(1);
        if threads == 1 {
            run(&mut self.workers[0], 0, &mut self.lanes);
            return;
        }
        let per_thread = layers.div_ceil(threads);
        thread::scope(|scope| {
            for (i, (worker, lanes)) in
                self.workers.iter_mut().zip(self.lanes.chunks_mut(per_thread)).enumerate()
            {
                scope.spawn(move || run(worker, i * per_thread, lanes));
            }
        });
    }

    /// What the step costs besides experts and exchanges: that of the rank with most rows, in every layer.
    fn other_us(&self, batch: &TokenBatch, layers: f64) -> f64 {
        let mut slowest = 0.0f64;
        for bounds in self.starts.windows(2) {
            let rows = &batch.rows[bounds[0]..bounds[1]];
            let decode = rows.iter().filter(|row| row.info.phase == Phase::Decode).count() as u64;
            let tokens = rows.len() as u64;
            slowest = slowest
                .max(layers * self.cost.other_us(tokens, decode) + self.cost.outside_us(tokens, decode));
        }
        slowest
    }

    /// What each layer did in the last step.
    pub fn last_step(&self) -> impl ExactSizeIterator<Item = &LayerStep> {
        self.lanes.iter().map(|lane| &lane.last)
    }

    /// The placement in force.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Tokens of each expert so far; `[layers][experts]`.
    pub fn expert_tokens(&self) -> Vec<Vec<u64>> {
        self.lanes.iter().map(|lane| lane.expert_tokens.clone()).collect()
    }

    /// The slowest ranks' experts so far.
    pub fn levels(&self) -> Levels {
        let mut levels = Levels::default();
        for sums in self.lanes.iter().map(Lane::sums) {
            levels.actual += sums.expert_us;
            levels.best_split += sums.best_expert_us;
            levels.hindsight += sums.hindsight_expert_us;
            levels.expected += sums.expected_expert_us;
            levels.unruled += sums.unruled_expert_us;
            levels.even += sums.even_expert_us;
        }
        levels
    }

    /// How the replay of a recorded run, up to before `step`, agrees with it; `None` where none is followed.
    ///
    /// # Errors
    /// Those of the placement policy.
    pub fn agreement(&mut self, step: u64) -> Result<Option<Agreement>> {
        let Mover::Recorded(follower) = &mut self.mover else { return Ok(None) };
        follower.before_step(step, &mut self.placement)?;
        Ok(Some(follower.agreement.clone()))
    }

    /// Ends the run. `fitted_on` is the load that the first placement was planned for.
    pub fn finish(self, fitted_on: &LoadWindow, first_placement: &Placement) -> Run {
        let ranks = self.placement.ranks();
        let plans = even_balancedness(fitted_on, first_placement);
        let layer_ids = self.placement.layer_ids();
        let figures =
            self.lanes.iter().zip(&plans).zip(layer_ids).map(|((lane, plan), id)| lane.figures(*id, *plan));
        let mut layers: Vec<_> = figures.collect();
        let group_bound = self.reference.and_then(|reference| {
            for (layer, figures) in layers.iter_mut().enumerate() {
                figures.group_bound = reference.group_bound(layer);
            }
            layers.iter().map(|layer| layer.group_bound).sum::<Option<f64>>()
        });
        let group_bound = group_bound.map(|sum| sum / layers.len() as f64);
        let rebalances = match self.mover {
            Mover::Nobody => Vec::new(),
            Mover::Live(live) => live.log,
            Mover::Recorded(follower) => follower.log,
        };
        let mut spread = Spread::default();
        let mut sum = LayerStep::default();
        for lane in &self.lanes {
            spread.merge(&lane.actual);
            sum.dispatch_us += lane.sums().dispatch_us;
            sum.expert_us += lane.sums().expert_us;
            sum.combine_us += lane.sums().combine_us;
        }
        let Sums { steps, tokens, us, other_us, stall_us } = self.sums;
        let per_step = 1.0 / steps.max(1) as f64;
        let mean = |figure: fn(&crate::report::data::LayerFigures) -> f64| {
            layers.iter().map(figure).sum::<f64>() / layers.len() as f64
        };
        let totals = Totals {
            steps,
            tokens,
            plan: mean(|layer| layer.plan),
            actual: spread.mean(),
            actual_p5: spread.percentile(0.05),
            best_split: mean(|layer| layer.best_split),
            bound: mean(|layer| layer.bound),
            group_bound,
            step_us: us * per_step,
            other_us: other_us * per_step,
            dispatch_us: sum.dispatch_us * per_step,
            expert_us: sum.expert_us * per_step,
            combine_us: sum.combine_us * per_step,
            stall_us: stall_us * per_step,
            tokens_per_s: if us > 0.0 { tokens as f64 / us * 1e6 } else { 0.0 },
            usd_per_million_tokens: self
                .cost
                .usd(us)
                .filter(|_| tokens > 0)
                .map(|usd| usd * 1e6 / tokens as f64),
            moved_bytes: rebalances.iter().map(|r| r.bytes).sum(),
            transfers: rebalances.iter().map(|r| r.transfers).sum(),
            expert_bytes_per_rank: (self.placement.slots_per_rank() * self.placement.layers()) as f64
                * self.cost.expert_bytes(),
        };
        let mut workers = self.workers.into_iter();
        let mut traffic = workers.next().expect("at least one").traffic;
        workers.for_each(|worker| traffic.merge(&worker.traffic));
        let (between, groups, per_group) = match ranks <= MOST_TRAFFIC_RANKS {
            true => ("rank", ranks, 1),
            false => ("node", ranks.div_ceil(self.ranks_per_node), self.ranks_per_node),
        };
        let mut bytes = vec![vec![0.0; groups]; groups];
        for (source, rows) in traffic.rows.chunks_exact(ranks).enumerate() {
            for (destination, &rows) in rows.iter().enumerate() {
                bytes[source / per_group][destination / per_group] +=
                    rows as f64 * self.cost.dispatch_bytes();
            }
        }
        Run {
            name: self.setup.name.clone(),
            policy: self.setup.policy.name().to_owned(),
            split: self.setup.split.name().to_owned(),
            slots: self.placement.slots(),
            totals,
            rank_tokens: self.lanes.iter().map(|lane| lane.rank_rows.clone()).collect(),
            layers,
            traffic: Traffic {
                between: between.to_owned(),
                bytes,
                local_rows: traffic.local_rows,
                rows: traffic.all_rows,
                rank_pairs: traffic.rank_pairs,
                node_pairs: traffic.node_pairs,
                remote_node_pairs: traffic.remote_node_pairs,
            },
            timeline: self.timeline.into_points(),
            rebalances,
            losses: Vec::new(),
        }
    }
}
