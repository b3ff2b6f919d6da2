//! Rebalancing while serving, as it is seen from outside.

use std::time::{Duration, Instant};

use router_sim::rebalance::{Mode, Verdict};
use router_sim::split::Split;

use super::RebalanceOptions;
use crate::engine::migration::MigrationProgress;
use crate::engine::mover::MigrationReport;

/// What rebalancing did, does, and why. Counters start at zero with the engine and never fall.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RebalanceStatus {
    /// When it acts by itself.
    pub mode: Mode,
    /// Name of the placement policy that plans; empty when the mode is off.
    pub policy: &'static str,
    /// Steps of load that it plans on; 0 when the mode is off.
    pub window_steps: u64,
    /// How rows are shared out among replicas.
    pub split: Split,
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
    /// The latest one that moved experts.
    pub last_applied: Option<LastDecision>,
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
pub(in crate::engine) struct Record {
    status: RebalanceStatus,
    decided: Option<Instant>,
    applied: Option<Instant>,
    looked: Option<Instant>,
}

impl Record {
    /// The engine has a rebalancer; `mode` may be off.
    pub fn begin(&mut self, options: RebalanceOptions, split: Split) {
        let RebalanceOptions { mode, policy, window_steps } = options;
        self.status.split = split;
        self.status.mode = mode;
        if mode != Mode::Off {
            (self.status.policy, self.status.window_steps) = (policy.name(), window_steps);
            self.looked = Some(Instant::now());
        }
    }

    /// A look at the load was decided; `applied` when its migration begins.
    pub fn decided(&mut self, verdict: &Verdict, applied: bool) {
        let now = Instant::now();
        (self.decided, self.looked) = (Some(now), Some(now));
        self.status.skipped += u64::from(!applied);
        let forecast = verdict.forecast;
        self.status.achieved = forecast.achieved.or(self.status.achieved);
        self.status.last = Some(LastDecision {
            step: verdict.step,
            age: Duration::ZERO,
            trigger: verdict.trigger.clone(),
            reason: verdict.reason.clone(),
            applied,
            balance_before: forecast.balance_before,
            balance_after: forecast.balance_after,
            balance_bound: forecast.balance_bound,
            sampling_floor: forecast.sampling_floor,
            gain_us_per_step: forecast.gain_us_per_step,
            moves: forecast.moves,
            bytes: forecast.bytes as u64,
        });
        if applied {
            (self.applied, self.status.last_applied) = (Some(now), self.status.last.clone());
        }
    }

    /// A migration has ended, whoever wanted it.
    pub fn ended(&mut self, report: &MigrationReport) {
        let MigrationReport { outcome, progress, duration, .. } = report;
        match outcome {
            Ok(()) => self.status.applied += 1,
            Err(_) => self.status.failed += 1,
        }
        self.status.moved_experts += progress.arrived;
        self.status.moved_bytes += progress.bytes;
        self.status.last_duration = Some(*duration);
        self.status.achieved = None;
    }

    /// The status as of `now`.
    pub fn status(&self, now: Instant) -> RebalanceStatus {
        let since = |then: Option<Instant>| then.map(|then| now.saturating_duration_since(then));
        let mut status = self.status.clone();
        status.since_look = since(self.looked);
        for (decision, then) in [(&mut status.last, self.decided), (&mut status.last_applied, self.applied)] {
            if let (Some(decision), Some(age)) = (decision, since(then)) {
                decision.age = age;
            }
        }
        status
    }
}
