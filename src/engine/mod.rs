//! Continuous batching over a paged KV cache: requests in, token events out.
//!
//! One engine thread (`driver`) runs the [`scheduler`]; one OS thread per rank ([`rank`]) runs the model. The server
//! and the command line hold an [`EngineHandle`] and never see a model, a backend or a communicator.
//!
//! A step: the scheduler fills a [`plan::StepPlan`] (one sub-plan per DP rank), every rank computes its sub-plan and
//! samples the logit rows it owns, the scheduler takes the results and reports events. What decides the text (plan,
//! blocks, sampling) is pure: no clock, no thread, no tensor.

// what comes in and goes out
pub mod handle;
pub mod options;
pub mod request;
pub mod stats;
// pure: what to compute, where it lives, which token follows
pub mod kv_blocks;
pub mod plan;
pub mod sampler;
pub mod scheduler;
mod sequence;
mod queue;
mod watchdog;
// where the experts live, changed while serving
pub mod rebalance;
pub mod migration;
mod pace;
// threads
mod mover;
mod driver;
pub mod rank;
pub mod recorder;
// a model without weights, for tests of everything above it
pub mod scripted;

pub use handle::{EngineHandle, RequestStream};
pub use migration::{Experts, MigrationProgress, MoveCost};
pub use mover::MigrationReport;
pub use options::{EngineOptions, SchedulingPolicy};
pub use rank::{RankSetup, StepObserver};
pub use rebalance::{RebalanceOptions, RebalanceSources, RebalanceStatus};
pub use stats::{EngineStats, TimingObserver};

use crate::error::Result;
use std::sync::Arc;

/// Names a request inside one engine; counts up in the order of submission.
pub type RequestId = u64;

/// What an engine works with besides its ranks: who watches it, and where its experts live. By default nobody watches, and
/// nobody asks for experts.
#[derive(Clone, Default)]
pub struct Hooks {
    /// Told about every step on every rank, from that rank's thread.
    pub steps: Option<Arc<dyn StepObserver>>,
    /// Told about durations, from the engine thread.
    pub timing: Option<Arc<dyn TimingObserver>>,
    /// The experts, whose place [`EngineHandle::placement`] tells and [`EngineHandle::move_to`] changes.
    pub experts: Option<Experts>,
    /// What decides where experts move; needs `experts`.
    pub rebalancing: Option<RebalanceSources>,
}

/// Starts engines; see [`Engine::start`].
pub struct Engine;

impl Engine {
    /// Starts one thread per rank and the engine thread, and returns the handle that requests go through. The threads
    /// end after [`EngineHandle::shutdown`], or when every handle and stream is gone.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when the options contradict each other or the ranks.
    pub fn start(ranks: Vec<RankSetup>, options: EngineOptions, hooks: Hooks) -> Result<EngineHandle> {
        options.check()?;
        rank::check_setups(&ranks, &options)?;
        Ok(driver::start(ranks, options, hooks))
    }
}
