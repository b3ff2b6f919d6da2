//! The state of rebalancing between looks.

use super::look::{Look, Promise, Verdict};
use super::patience::Patience;
use super::window::Window;
use super::{Inputs, Rebalancing};
use crate::load::LoadWindow;
use crate::placement::{ClusterShape, Placement, PolicyName};
use crate::split::Split;

/// What is due after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Nothing.
    Nothing,
    /// A part of the window is full: [`Rebalancer::end_part`].
    Part,
    /// A look: [`Rebalancer::look`].
    Look,
}

/// Watches the load of a run. Its driver tells it of every step, decides its looks, and tells it what became of their
/// verdicts:
/// ```text
/// after each step         after_step -> Part: end_part
///                                    -> Look: look -> decide (may take some steps) -> decided
/// a verdict with a target              ... the experts move ... -> moved | failed
/// an operator's order     interrupted  ... the experts move ... -> overruled | failed
/// ```
#[derive(Debug, Clone)]
pub struct Rebalancer {
    settings: Rebalancing,
    policy: PolicyName,
    cluster: ClusterShape,
    split: Split,
    window: Window,
    since_look: u64,
    state: State,
    armed: bool,
    patience: Patience,
    /// Of the migration that was completed last.
    promise: Option<Promise>,
}

#[derive(Debug, Clone)]
enum State {
    Idle,
    /// A look has been taken and not been decided.
    Deciding {
        step: u64,
        placement: Placement,
    },
    /// Experts are on their way.
    Moving(Promise),
    /// Experts are on their way on somebody else's word.
    Interrupted,
}

impl Rebalancer {
    /// For a run that counts from `counts` on. The settings have been checked.
    pub fn new(
        settings: Rebalancing,
        policy: PolicyName,
        cluster: ClusterShape,
        split: Split,
        counts: LoadWindow,
    ) -> Self {
        let patience = Patience::new(settings.window, settings.interval);
        Rebalancer {
            settings,
            policy,
            cluster,
            split,
            window: Window::new(settings.parts, settings.part_steps(), counts),
            since_look: 0,
            state: State::Idle,
            armed: true,
            patience,
            promise: None,
        }
    }

    /// How it rebalances.
    pub fn settings(&self) -> &Rebalancing {
        &self.settings
    }

    /// A verdict is waited for, or experts are on their way.
    pub fn is_busy(&self) -> bool {
        !matches!(self.state, State::Idle)
    }

    /// The verdict of a look taken before `step` is waited for.
    pub fn awaits(&self, step: u64) -> bool {
        matches!(self.state, State::Deciding { step: asked, .. } if asked == step)
    }

    /// MoE layers.
    pub fn layers(&self) -> usize {
        self.window.layers()
    }

    /// The part of the window that is under way has all its steps.
    pub fn part_is_full(&self) -> bool {
        self.window.is_full()
    }

    /// A step has run.
    pub fn after_step(&mut self) -> Due {
        let full = self.window.count_step();
        self.since_look += 1;
        if self.since_look >= self.settings.interval && !self.is_busy() {
            Due::Look
        } else if full {
            Due::Part
        } else {
            Due::Nothing
        }
    }

    /// A part of the window ends before `step`; `counts` is the load since the start.
    pub fn end_part(&mut self, step: u64, counts: &LoadWindow) {
        self.window.end_part(step, counts);
    }

    /// Looks at the window before `step`; `counts` is the load since the start, `placement` the one in force.
    ///
    /// # Panics
    /// When it is busy.
    pub fn look(&mut self, step: u64, counts: &LoadWindow, inputs: Inputs, placement: &Placement) -> Look {
        assert!(!self.is_busy(), "one decision at a time");
        if self.window.is_full() {
            self.window.end_part(step, counts);
        }
        self.since_look = 0;
        self.state = State::Deciding { step, placement: placement.clone() };
        Look {
            step,
            parts: self.window.parts(step, counts),
            settings: self.settings,
            policy: self.policy,
            cluster: self.cluster,
            split: self.split,
            inputs,
            placement: placement.clone(),
            armed: self.armed,
            patience: self.patience,
            promise: self.promise.clone(),
        }
    }

    /// The look has been decided. With a target, experts are taken to be on their way.
    ///
    /// # Panics
    /// When no look waits.
    pub fn decided(&mut self, verdict: &Verdict) {
        let State::Deciding { placement, .. } = std::mem::replace(&mut self.state, State::Idle) else {
            panic!("a verdict on step {} without a look", verdict.step);
        };
        (self.armed, self.patience) = (verdict.armed, verdict.patience);
        if verdict.target.is_some() {
            self.state = State::Moving(Promise { before: placement, share: verdict.share, since: u64::MAX });
        }
    }

    /// All experts have arrived: the target is in force from `step` on.
    pub fn moved(&mut self, step: u64) {
        if let State::Moving(promise) = std::mem::replace(&mut self.state, State::Idle) {
            self.patience.moved(step);
            self.promise = Some(Promise { since: step, ..promise });
        }
    }

    /// The look or the migration came to nothing before `step`: it is tried again later, and later still.
    pub fn failed(&mut self, step: u64) {
        self.state = State::Idle;
        self.patience.failed(step);
    }

    /// Experts move on somebody else's word; a look that waits for its verdict is forgotten.
    pub fn interrupted(&mut self) {
        self.state = State::Interrupted;
    }

    /// Somebody else's placement is in force from `step` on.
    pub fn overruled(&mut self, step: u64) {
        self.state = State::Idle;
        self.patience.overruled(step);
        self.promise = None;
    }
}
