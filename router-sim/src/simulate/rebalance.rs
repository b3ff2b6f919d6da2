//! Rebalancing while serving: when to look, what to plan on, when to move.

use std::collections::VecDeque;

use super::migration::Migration;
use super::plan::{PolicyName, plan};
use crate::cost::CostModel;
use crate::load::{LoadWindow, balancedness};
use crate::placement::{ClusterShape, Placement};
use crate::report::data::Rebalance;
use crate::split::even_rank_loads;
use crate::{Error, Result};

/// When to replan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Trigger {
    /// Every so many steps.
    Interval,
    /// When the window's balancedness falls below `below`. After a decision it must have been above `rearm` once before
    /// the next one, so that a load that cannot be balanced does not replan for ever.
    Balance {
        /// Mean over layers.
        below: f64,
        /// At least `below`.
        rearm: f64,
    },
}

/// How a run rebalances.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rebalancing {
    /// Steps between two looks at the load.
    pub interval: u64,
    /// Steps that are looked at.
    pub window: u64,
    /// Parts that the window is planned on; with one, on its sum.
    pub parts: usize,
    /// What a look leads to.
    pub trigger: Trigger,
    /// Least part of the predicted rows of the slowest ranks that a plan must save to be carried out.
    pub min_gain: f64,
    /// Experts that may move per layer; `None` without limit.
    pub max_transfers: Option<usize>,
    /// Serving waits for all weights instead of going on meanwhile.
    pub synchronous: bool,
}

impl Default for Rebalancing {
    fn default() -> Self {
        Rebalancing {
            interval: 1000,
            window: 1000,
            parts: 4,
            trigger: Trigger::Interval,
            min_gain: 0.01,
            max_transfers: None,
            synchronous: false,
        }
    }
}

impl Rebalancing {
    /// Checks every limit.
    ///
    /// # Errors
    /// [`Error::Impossible`] with name, limit and value.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: &str, value: String, limit: &str| {
            Err(Error::Impossible(format!("rebalancing: {what} {value} must be {limit}")))
        };
        if self.interval == 0 || self.window == 0 {
            let least = self.interval.min(self.window).to_string();
            return refuse("interval and window", least, "at least 1 step");
        }
        if self.parts == 0 || self.parts as u64 > self.window {
            return refuse(
                "window parts",
                self.parts.to_string(),
                &format!("within 1..={} steps", self.window),
            );
        }
        if !(0.0..1.0).contains(&self.min_gain) {
            return refuse("min gain", self.min_gain.to_string(), "at least 0 and below 1");
        }
        if let Trigger::Balance { below, rearm } = self.trigger {
            if !(0.0..=1.0).contains(&below) {
                return refuse("below", below.to_string(), "within 0..=1");
            }
            if !(below..=1.0).contains(&rearm) {
                return refuse("rearm", rearm.to_string(), &format!("within {below}..=1"));
            }
        }
        Ok(())
    }
}

/// Watches the load of a run and moves its experts.
#[derive(Debug, Clone)]
pub(super) struct Rebalancer {
    settings: Rebalancing,
    policy: PolicyName,
    shape: ClusterShape,
    /// The window's parts, oldest first; the last one is being filled.
    parts: VecDeque<LoadWindow>,
    steps_in_part: u64,
    since_look: u64,
    armed: bool,
    migration: Option<Migration>,
    pub log: Vec<Rebalance>,
}

impl Rebalancer {
    pub fn new(settings: Rebalancing, policy: PolicyName, shape: ClusterShape, empty: LoadWindow) -> Self {
        Rebalancer {
            settings,
            policy,
            shape,
            parts: VecDeque::from([empty]),
            steps_in_part: 0,
            since_look: 0,
            armed: true,
            migration: None,
            log: Vec::new(),
        }
    }

    /// Layers whose new placement has not arrived.
    pub fn layers_in_flight(&self) -> usize {
        self.migration.as_ref().map_or(0, Migration::layers_in_flight)
    }

    /// Takes the load of the step that ran, of `us` microseconds; `step` is the next one. Returns for how long serving
    /// waits.
    pub fn after_step(
        &mut self,
        add_load: impl FnOnce(&mut LoadWindow),
        us: f64,
        step: u64,
        placement: &mut Placement,
        cost: &CostModel,
    ) -> Result<f64> {
        add_load(self.parts.back_mut().expect("never empty"));
        self.steps_in_part += 1;
        self.since_look += 1;
        let mut stall = 0.0;
        if self.migration.is_some() {
            stall += self.advance(us, step, placement, cost)?;
        } else if self.since_look >= self.settings.interval {
            self.since_look = 0;
            stall += self.look(step, placement, cost)?;
        }
        self.roll();
        Ok(stall)
    }

    /// Begins another part of the window when the last one is full.
    fn roll(&mut self) {
        let Rebalancing { window, parts, .. } = self.settings;
        if self.steps_in_part < window.div_ceil(parts as u64) {
            return;
        }
        self.steps_in_part = 0;
        let mut next = match self.parts.len() >= parts {
            true => self.parts.pop_front().expect("never empty"),
            false => self.parts[0].clone(),
        };
        next.clear();
        self.parts.push_back(next);
    }

    fn advance(&mut self, us: f64, step: u64, placement: &mut Placement, cost: &CostModel) -> Result<f64> {
        let Some(migration) = &mut self.migration else { return Ok(0.0) };
        let switched = migration.advance(us, placement)?;
        if migration.layers_in_flight() == 0 {
            self.migration = None;
            if let Some(last) = self.log.last_mut() {
                last.done = Some(step);
            }
        }
        Ok(switched as f64 * cost.switch_us())
    }

    /// Looks at the window and perhaps starts a migration.
    fn look(&mut self, step: u64, placement: &mut Placement, cost: &CostModel) -> Result<f64> {
        let windows: Vec<LoadWindow> = self.parts.iter().filter(|w| has_tokens(w)).cloned().collect();
        let Some((first, others)) = windows.split_first() else { return Ok(0.0) };
        let mut sum = first.clone();
        for window in others {
            sum.merge(window)?;
        }
        let before = planned(&sum, placement);
        let balance = mean(before.iter().map(|layer| layer.balance));
        let trigger = match self.settings.trigger {
            Trigger::Interval => "interval".to_owned(),
            Trigger::Balance { below, rearm } => {
                self.armed |= balance >= rearm;
                if balance >= below || !self.armed {
                    return Ok(0.0);
                }
                format!("balancedness {balance:.3} below {below}")
            }
        };
        let target = plan(self.policy, &windows, &self.shape, Some(placement), self.settings.max_transfers)?;
        let after = planned(&sum, &target);
        let rows = |layers: &[PlannedLayer]| layers.iter().map(|layer| layer.max as f64).sum::<f64>();
        let gain = 1.0 - rows(&after) / rows(&before);
        if gain < self.settings.min_gain {
            return Ok(0.0);
        }
        self.armed = false;
        let gains: Vec<f64> =
            before.iter().zip(&after).map(|(old, new)| old.max as f64 - new.max as f64).collect();
        let migration = Migration::new(placement, target, &gains, cost);
        self.log.push(Rebalance {
            step,
            done: None,
            trigger,
            transfers: migration.transfers,
            bytes: migration.transfers as f64 * cost.expert_bytes(),
            before: balance,
            after: mean(after.iter().map(|layer| layer.balance)),
        });
        let whole = migration.us();
        self.migration = Some(migration);
        match self.settings.synchronous {
            false => self.advance(0.0, step, placement, cost),
            true => Ok(whole + self.advance(whole * (1.0 + 1e-9) + 1e-6, step, placement, cost)?),
        }
    }
}

/// A layer of a window under a placement, evenly split.
#[derive(Debug, Clone, Copy)]
pub(super) struct PlannedLayer {
    pub balance: f64,
    pub max: u64,
}

/// What a window's rows come to under a placement, evenly split, as planning assumes; `[layers]`.
pub(super) fn planned(window: &LoadWindow, placement: &Placement) -> Vec<PlannedLayer> {
    (0..placement.layers())
        .map(|layer| {
            let counts: Vec<u64> = window.totals(layer).collect();
            let loads = even_rank_loads(placement.layer(layer), &counts);
            PlannedLayer { balance: balancedness(&loads), max: loads.iter().copied().max().unwrap_or(0) }
        })
        .collect()
}

fn has_tokens(window: &LoadWindow) -> bool {
    (0..window.layers()).any(|layer| window.totals(layer).any(|n| n > 0))
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len().max(1) as f64;
    values.sum::<f64>() / n
}
