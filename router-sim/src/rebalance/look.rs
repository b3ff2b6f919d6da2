//! One look at the load: what it leads to, and why.

use super::forecast::{self, Forecast, Forecaster, LayerGain};
use super::patience::Patience;
use super::window::{Part, joined};
use super::{Inputs, Rebalancing, Trigger};
use crate::Result;
use crate::load::{LoadWindow, Phase};
use crate::placement::{ClusterShape, Placement, PlanOptions, PolicyName, arrivals, plan};
use crate::report::figures::{figures, micros, percent};
use crate::split::Split;
use crate::trace::Decision;

/// The trigger of a [`Decision`] that an operator made, not a look.
pub const OPERATOR: &str = "operator";

/// Gain over the horizon must be this many times the cost of moving.
const MARGIN: f64 = 2.0;

/// Everything that a decision is made from, taken at one moment: [`Look::decide`] may take its time on another thread.
#[derive(Debug, Clone)]
pub struct Look {
    pub(super) step: u64,
    pub(super) parts: Vec<Part>,
    pub(super) settings: Rebalancing,
    pub(super) policy: PolicyName,
    pub(super) cluster: ClusterShape,
    pub(super) split: Split,
    pub(super) inputs: Inputs,
    pub(super) placement: Placement,
    pub(super) armed: bool,
    pub(super) patience: Patience,
    pub(super) promise: Option<Promise>,
}

/// What the latest migration was to bring.
#[derive(Debug, Clone)]
pub(super) struct Promise {
    /// The placement before it.
    pub before: Placement,
    /// The part of the cost that was to be saved.
    pub share: f64,
    /// The first step after it.
    pub since: u64,
}

/// What a look led to.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// Made before this step.
    pub step: u64,
    /// What asked for it.
    pub trigger: String,
    /// Why experts move, or stay.
    pub reason: String,
    /// Steps of the load that was looked at.
    pub window_steps: u64,
    /// That load.
    pub load: LoadWindow,
    /// Version of the placement that was in force.
    pub current_version: u64,
    /// The numbers that it was told.
    pub inputs: Inputs,
    /// The figures that it came to.
    pub forecast: Forecast,
    /// Where experts are to live, numbered as if it came at once; `None` when they stay.
    pub target: Option<Placement>,
    /// What each layer wins, in microseconds over the load that was looked at; `[layers]`, empty when experts stay.
    pub gains: Vec<f64>,
    /// The part of the cost that is saved.
    pub(super) share: f64,
    pub(super) armed: bool,
    pub(super) patience: Patience,
}

impl Verdict {
    /// As a trace keeps it.
    pub fn to_decision(&self) -> Decision {
        Decision {
            step: self.step,
            trigger: self.trigger.clone(),
            window_steps: self.window_steps,
            load: self.load.clone(),
            current_version: self.current_version,
            inputs: self.inputs.to_map(),
            forecast: self.forecast.to_map(),
            chosen: self.target.clone(),
            reason: self.reason.clone(),
        }
    }
}

impl Look {
    /// The step before which it was taken.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// What the look leads to. Pure: the same look gives the same verdict, always.
    ///
    /// # Errors
    /// Those of the policy, or of loads beyond [`MAX_TOKENS`](crate::split::MAX_TOKENS).
    pub fn decide(&self) -> Result<Verdict> {
        let mut verdict = self.undecided();
        let Some(window) = joined(&self.parts)?.filter(|window| has_tokens(&window.load)) else {
            return Ok(verdict);
        };
        let mut forecaster = Forecaster::new(self.split, self.inputs.row_us);
        let balance = forecaster.balance(&window.load, &self.placement)?;
        (verdict.load, verdict.window_steps) = (window.load.clone(), window.steps);
        verdict.forecast = Forecast {
            balance_before: balance,
            balance_after: balance,
            balance_bound: forecast::balance_bound(&window.load, &self.placement),
            sampling_floor: forecast::sampling_floor(&window.load, window.steps, self.cluster.ranks),
            ..Forecast::default()
        };
        self.judge(&mut forecaster, &mut verdict)?;
        match self.waits(&mut verdict) {
            Some(reason) => verdict.reason = reason,
            None => self.plan(&window, &mut forecaster, &mut verdict)?,
        }
        Ok(verdict)
    }

    fn undecided(&self) -> Verdict {
        let trigger = match self.settings.trigger {
            Trigger::Interval => "interval",
            Trigger::Balance { .. } => "balancedness",
            Trigger::Payoff => "auto",
        };
        Verdict {
            step: self.step,
            trigger: trigger.to_owned(),
            reason: "there are no tokens in the window".to_owned(),
            window_steps: 0,
            load: LoadWindow::new(self.placement.layer_ids(), self.placement.experts()),
            current_version: self.placement.version(),
            inputs: self.inputs,
            forecast: Forecast::default(),
            target: None,
            gains: Vec::new(),
            share: 0.0,
            armed: self.armed,
            patience: self.patience,
        }
    }

    /// Compares what the last migration promised with the load that came since.
    fn judge(&self, forecaster: &mut Forecaster, verdict: &mut Verdict) -> Result<()> {
        let Some(promise) = &self.promise else { return Ok(()) };
        let first = self.parts.partition_point(|part| part.first_step < promise.since);
        let Some(since) = joined(&self.parts[first..])?.filter(|since| has_tokens(&since.load)) else {
            return Ok(());
        };
        let without = forecaster.cost_us(&since.load, &promise.before)?;
        let with = forecaster.cost_us(&since.load, &self.placement)?;
        let kept = share(without - with, without) / promise.share;
        verdict.forecast.achieved = Some(forecaster.balance(&since.load, &self.placement)?);
        verdict.forecast.kept = Some(kept);
        verdict.patience.judge(self.step, kept);
        Ok(())
    }

    /// Why there is to be no plan now.
    fn waits(&self, verdict: &mut Verdict) -> Option<String> {
        if let Some((failures, until)) =
            self.patience.backs_off_until().filter(|(_, until)| self.step < *until)
        {
            return Some(format!("{failures} migrations in a row have failed: waiting until step {until}"));
        }
        match self.settings.trigger {
            Trigger::Interval => None,
            Trigger::Balance { below, rearm } => {
                let balance = verdict.forecast.balance_before;
                verdict.armed |= balance >= rearm;
                if balance >= below {
                    return Some(format!("balancedness {balance:.3} is not below {below}"));
                }
                verdict.trigger = format!("balancedness {balance:.3} below {below}");
                (!verdict.armed)
                    .then(|| format!("balancedness has not been above {rearm} since the last plan"))
            }
            Trigger::Payoff => {
                let until = verdict.patience.rests_until().filter(|until| self.step < *until)?;
                Some(match verdict.forecast.kept {
                    None => format!(
                        "the last migration has to show first what it brings: resting until step {until}"
                    ),
                    Some(kept) => format!(
                        "the last migration kept {} of what it promised so far: resting until step {until}",
                        percent(kept)
                    ),
                })
            }
        }
    }

    /// Plans, and chooses the layers that move.
    fn plan(&self, window: &Part, forecaster: &mut Forecaster, verdict: &mut Verdict) -> Result<()> {
        let windows: Vec<LoadWindow> =
            self.parts.iter().filter(|part| has_tokens(&part.load)).map(|part| part.load.clone()).collect();
        let options = PlanOptions {
            max_transfers: self.settings.max_transfers,
            phase_shares: phase_shares(&window.load, self.inputs.row_us),
        };
        let planned = plan(self.policy, &windows, &self.cluster, Some(&self.placement), options)?;
        let pays = self.settings.trigger == Trigger::Payoff;
        let evidence = if pays { self.lasting(&planned, forecaster)? } else { Some(window.clone()) };
        let Some(evidence) = evidence else {
            verdict.reason = "no plan serves the newest steps better".to_owned();
            return Ok(());
        };
        let gains = forecaster.gains(&evidence.load, &self.placement, &planned)?;
        let steps = evidence.steps as f64;
        let horizon = if pays { steps * verdict.patience.trust() } else { 0.0 };
        let gainful: Vec<usize> = (0..gains.len())
            .filter(|&l| gains[l].gain > 0.0 && gains[l].gain >= self.settings.min_gain * gains[l].before)
            .collect();
        let received = |layer: usize| arrivals(self.placement.layer(layer), planned.layer(layer));
        let cost = |layer: usize| {
            let most = received(layer).into_iter().max().unwrap_or(0);
            self.inputs.moving_us(most)
        };
        let moving: Vec<usize> = gainful
            .iter()
            .copied()
            .filter(|&l| !pays || gains[l].gain / steps * horizon >= MARGIN * cost(l))
            .collect();
        let over =
            |layers: &[usize], of: fn(&LayerGain) -> f64| layers.iter().map(|&l| of(&gains[l])).sum::<f64>();
        // Where nothing moves, the figures tell what was not worth it.
        let told = if moving.is_empty() { &gainful } else { &moving };
        let (gain, cost) = (over(told, |g| g.gain) / steps, told.iter().map(|&l| cost(l)).sum::<f64>());
        verdict.forecast.gain_us_per_step = gain;
        verdict.forecast.horizon_steps = horizon;
        verdict.forecast.cost_us = cost;
        let terms = || {
            format!(
                "{} per step for {} steps against {} of moving",
                micros(gain),
                figures(horizon),
                micros(cost)
            )
        };
        let all = gains.len();
        let layers = |n: usize| if n == 1 { "1 layer".to_owned() } else { format!("{n} layers") };
        if gainful.is_empty() {
            verdict.reason = format!("no layer would gain {}", percent(self.settings.min_gain));
            return Ok(());
        }
        if moving.is_empty() {
            verdict.reason = format!("moving {} does not pay: {}", layers(gainful.len()), terms());
            return Ok(());
        }
        let target =
            self.placement.with_layers_of(&planned, &moving).with_version(self.placement.version() + 1);
        verdict.reason = match pays {
            true => format!("moving {} of {all} pays: {}", layers(moving.len()), terms()),
            false => format!("moving {} of {all} saves {} per step", layers(moving.len()), micros(gain)),
        };
        verdict.forecast.moves = moving.iter().flat_map(|&l| received(l)).sum::<usize>() as u64;
        verdict.forecast.bytes = verdict.forecast.moves as f64 * self.inputs.expert_bytes;
        verdict.forecast.balance_after = forecaster.balance(&window.load, &target)?;
        let everything: Vec<usize> = (0..all).collect();
        verdict.share = share(over(&moving, |g| g.gain), over(&everything, |g| g.before));
        verdict.gains = gains.iter().map(|g| g.gain).collect();
        verdict.target = Some(target);
        verdict.armed = false;
        Ok(())
    }

    /// The newest parts in which a plan is better than what is there, one after another; `None` when not even the newest.
    fn lasting(&self, planned: &Placement, forecaster: &mut Forecaster) -> Result<Option<Part>> {
        let mut first = self.parts.len();
        while first > 0 {
            let gains = forecaster.gains(&self.parts[first - 1].load, &self.placement, planned)?;
            if gains.iter().map(|g| g.gain).sum::<f64>() <= 0.0 {
                break;
            }
            first -= 1;
        }
        joined(&self.parts[first..])
    }
}

/// Expert time of prefill and decode, as their rows are; `None` without any.
fn phase_shares(load: &LoadWindow, row_us: [f64; 2]) -> Option<[f64; 2]> {
    let rows = |phase| {
        (0..load.layers()).flat_map(|layer| load.counts(phase, layer)).map(|n| *n as f64).sum::<f64>()
    };
    let [prefill, decode] = Phase::ALL.map(rows);
    let shares = [prefill * row_us[0], decode * row_us[1]];
    (shares.iter().all(|s| s.is_finite()) && shares.iter().sum::<f64>() > 0.0).then_some(shares)
}

fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

fn has_tokens(load: &LoadWindow) -> bool {
    (0..load.layers()).any(|layer| load.totals(layer).any(|n| n > 0))
}
