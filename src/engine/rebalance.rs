//! Rebalancing while serving, as it is seen from outside.

use std::time::{Duration, Instant};

pub use super::migration::MigrationProgress;
pub use router_sim::rebalance::Mode;

/// What rebalancing did, does, and why. Counters start at zero with the engine and never fall.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RebalanceStatus {
    /// When it acts by itself.
    pub mode: Mode,
    /// Name of the placement policy that plans; empty when the mode is off.
    pub policy: &'static str,
    /// Steps of load that it plans on; 0 when the mode is off.
    pub window_steps: u64,
    /// Version of the placement in force.
    pub placement_version: u64,
    /// Since that placement came into force.
    pub placement_age: Duration,
    /// Migrations that arrived whole.
    pub applied: u64,
    /// Looks that led to none.
    pub skipped: u64,
    /// Migrations that were given up; the placement before them stayed in force.
    pub failed: u64,
    /// Experts whose weights travelled to another slot.
    pub moved_experts: u64,
    /// Their bytes, over all ranks.
    pub moved_bytes: u64,
    /// From the first to the last byte, of the migration that ended last.
    pub last_duration: Option<Duration>,
    /// The migration under way.
    pub migration: Option<MigrationProgress>,
    /// The latest decision.
    pub last: Option<LastDecision>,
    /// Balancedness (mean over layers) that the latest migration's placement had on the load that came after it; `None`
    /// until a part of the window is over.
    pub achieved: Option<f64>,
    /// Since the load was last looked at, or since the start: what tells that the rebalancer lives. `None` when the mode
    /// is off.
    pub since_look: Option<Duration>,
}

/// One decision. Balancedness is the mean over layers, 1 is perfect; imbalance ratios are max / mean - 1, 0 is perfect.
#[derive(Debug, Clone, PartialEq)]
pub struct LastDecision {
    /// Made before this step.
    pub step: u64,
    /// Since it was made.
    pub age: Duration,
    /// What asked for it.
    pub trigger: String,
    /// Why experts move, or stay, in words.
    pub reason: String,
    /// A migration was started.
    pub applied: bool,
    /// Balancedness of the window under the placement in force.
    pub balance_before: f64,
    /// And under the one that was planned.
    pub balance_after: f64,
    /// The best that any placement with as many slots allows.
    pub balance_bound: f64,
    /// Imbalance ratio that chance alone leaves at the batch size of the window's mean step.
    pub sampling_floor: f64,
    /// Predicted gain per step, in microseconds.
    pub gain_us_per_step: f64,
    /// Experts that the plan moves.
    pub moves: u64,
    /// Their bytes, over all ranks.
    pub bytes: u64,
}

/// What the engine thread notes down.
#[derive(Debug, Default)]
pub(super) struct Record {
    status: RebalanceStatus,
    placed: Option<Instant>,
    decided: Option<Instant>,
    looked: Option<Instant>,
}

impl Record {
    /// The status as of `now`.
    pub fn status(&self, now: Instant) -> RebalanceStatus {
        let since = |then: Option<Instant>| then.map(|then| now.saturating_duration_since(then));
        let mut status = self.status.clone();
        status.placement_age = since(self.placed).unwrap_or_default();
        status.since_look = since(self.looked);
        if let (Some(last), Some(age)) = (&mut status.last, since(self.decided)) {
            last.age = age;
        }
        status
    }
}
