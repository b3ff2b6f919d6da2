//! Rebalancing while serving: the engine's [`Rebalancer`], driven by modelled time.

use super::lane::LayerStep;
use super::migration::Migration;
use crate::cost::CostModel;
use crate::load::LoadWindow;
use crate::placement::{ClusterShape, Placement, PolicyName, RoundLimits};
use crate::rebalance::{Due, Inputs, Rebalancer, Rebalancing, RowTime};
use crate::report::data::Rebalance;
use crate::split::Split;
use crate::stream::TokenBatch;
use crate::{Error, Result};

/// How a run rebalances, and how its experts travel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LiveRebalancing {
    /// When and what.
    pub rebalancing: Rebalancing,
    /// Experts that each rank receives before a placement switches; at least 1.
    pub staging_slots: usize,
    /// Serving waits for all weights instead of going on meanwhile.
    pub synchronous: bool,
}

impl Default for LiveRebalancing {
    fn default() -> Self {
        LiveRebalancing { rebalancing: Rebalancing::default(), staging_slots: 1, synchronous: false }
    }
}

impl LiveRebalancing {
    /// Checks every limit.
    ///
    /// # Errors
    /// [`Error::Impossible`] with name, limit and value.
    pub fn check(&self) -> Result<()> {
        self.rebalancing.check()?;
        match self.staging_slots {
            0 => Err(Error::Impossible("rebalancing: staging slots 0 must be at least 1".into())),
            _ => Ok(()),
        }
    }
}

/// A run's rebalancer and its migration under way.
#[derive(Debug, Clone)]
pub(super) struct Live {
    rebalancer: Rebalancer,
    limits: RoundLimits,
    synchronous: bool,
    /// Load since the start.
    counts: LoadWindow,
    row_time: RowTime,
    migration: Option<Migration>,
    pub log: Vec<Rebalance>,
}

/// What a step of the run was.
pub(super) struct Served<'a> {
    pub batch: &'a TokenBatch,
    /// How long it took, in microseconds.
    pub us: f64,
    /// The number of the step after it.
    pub next: u64,
}

impl Live {
    pub fn new(
        settings: LiveRebalancing,
        policy: PolicyName,
        cluster: ClusterShape,
        split: Split,
        ranks_per_node: usize,
        counts: LoadWindow,
    ) -> Self {
        let LiveRebalancing { rebalancing, staging_slots, synchronous } = settings;
        Live {
            rebalancer: Rebalancer::new(rebalancing, policy, cluster, split, counts.clone()),
            limits: RoundLimits { staging_per_rank: staging_slots, ranks_per_node },
            synchronous,
            counts,
            row_time: RowTime::default(),
            migration: None,
            log: Vec::new(),
        }
    }

    /// Layers whose new placement has not arrived.
    pub fn layers_in_flight(&self) -> usize {
        self.migration.as_ref().map_or(0, Migration::layers_in_flight)
    }

    /// Takes the load of the step that ran, and what its layers did. Returns for how long serving waits.
    pub fn after_step<'l>(
        &mut self,
        served: Served<'_>,
        layers: impl Iterator<Item = &'l LayerStep>,
        placement: &mut Placement,
        cost: &CostModel,
    ) -> Result<f64> {
        let Served { batch, us, next } = served;
        batch.add_to(&mut self.counts);
        add_row_time(&mut self.row_time, batch, layers);
        let mut stall = 0.0;
        if self.migration.is_some() {
            stall += self.advance(us, next, placement, cost);
        }
        match self.rebalancer.after_step() {
            Due::Nothing => {}
            Due::Part => self.rebalancer.end_part(next, &self.counts),
            Due::Look => stall += self.look(next, placement, cost)?,
        }
        Ok(stall)
    }

    fn advance(&mut self, us: f64, step: u64, placement: &mut Placement, cost: &CostModel) -> f64 {
        let Some(migration) = &mut self.migration else { return 0.0 };
        let switched = migration.advance(us, placement);
        if migration.is_over() {
            self.migration = None;
            self.rebalancer.moved(step);
            if let Some(last) = self.log.last_mut() {
                last.done = Some(step);
            }
        }
        switched as f64 * cost.switch_us()
    }

    /// Looks at the window and perhaps starts a migration.
    fn look(&mut self, step: u64, placement: &mut Placement, cost: &CostModel) -> Result<f64> {
        let inputs = Inputs {
            row_us: self.row_time.take(),
            expert_bytes: cost.expert_bytes(),
            migration_bytes_per_us: cost.expert_bytes() / cost.migration_us(1),
            switch_us: cost.switch_us(),
        };
        let verdict = self.rebalancer.look(step, &self.counts, inputs, placement).decide()?;
        self.rebalancer.decided(&verdict);
        let Some(target) = &verdict.target else { return Ok(0.0) };
        let migration = Migration::new(placement, target, &verdict.gains, self.limits, cost);
        self.log.push(Rebalance {
            step,
            done: None,
            trigger: verdict.trigger,
            transfers: migration.arrivals,
            bytes: migration.arrivals as f64 * cost.expert_bytes(),
            before: verdict.forecast.balance_before,
            after: verdict.forecast.balance_after,
        });
        let whole = migration.us();
        self.migration = Some(migration);
        Ok(match self.synchronous {
            false => self.advance(0.0, step, placement, cost),
            true => whole + self.advance(whole * (1.0 + 1e-9) + 1e-6, step, placement, cost),
        })
    }
}

/// The slowest ranks' experts are what a row is measured by.
fn add_row_time<'l>(row_time: &mut RowTime, batch: &TokenBatch, layers: impl Iterator<Item = &'l LayerStep>) {
    let (us, rows) = layers.fold((0.0, 0), |(us, rows), layer| (us + layer.expert_us, rows + layer.max_rows));
    row_time.add(us, rows as f64, batch.phase_rows());
}
