//! Rebalancing while serving: the engine's side of [`router_sim::rebalance`].
//!
//! The `Balancer` lives on the engine thread. It counts steps, reads the load counters where a part of the window ends
//! (all ranks have answered then, so they are exact), and hands looks to the planner's thread, because planning may take
//! longer than a step. Verdicts come back between steps; those with a target become a migration. Everything that a replay
//! needs to decide alike goes to the routing trace.

mod balancer;
mod planner;
mod status;

pub(super) use balancer::Balancer;
pub(super) use status::Record;

pub use super::migration::MigrationProgress;
pub use router_sim::rebalance::{Forecast, Mode, Verdict};
pub use status::{LastDecision, RebalanceStatus};

use std::sync::Arc;

use router_sim::placement::PolicyName;
use router_sim::rebalance::Rebalancing;
use router_sim::split::Split;

use super::recorder::Recorder;
use crate::metrics::{LoadSource, RankMeter};

/// When and how an engine rebalances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RebalanceOptions {
    /// When it acts by itself.
    pub mode: Mode,
    /// Who plans.
    pub policy: PolicyName,
    /// Steps of load that are planned on, at least 1.
    pub window_steps: u64,
}

impl RebalanceOptions {
    /// What they stand for; `None` when the engine does not act by itself.
    pub fn settings(&self) -> Option<Rebalancing> {
        Rebalancing::of_mode(self.mode, self.window_steps, self.policy)
    }
}

/// What rebalancing works with.
#[derive(Clone)]
pub struct RebalanceSources {
    /// When and how.
    pub options: RebalanceOptions,
    /// How rows are shared out among replicas.
    pub split: Split,
    /// Experts per token.
    pub top_k: usize,
    /// Tokens of all experts since the start.
    pub load: Arc<dyn LoadSource>,
    /// What every rank of the world spends its time on.
    pub meters: Vec<Arc<RankMeter>>,
    /// Takes down what happens.
    pub recorder: Option<Arc<Recorder>>,
}
