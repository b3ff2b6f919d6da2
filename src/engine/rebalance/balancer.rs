//! The rebalancer on the engine thread.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Placement};
use router_sim::rebalance::{Due, Inputs, OPERATOR, Rebalancer, RowTime, Verdict};
use router_sim::trace::{Decision, Event, Failure, Moves, Switch};

use super::planner::Planner;
use super::{RebalanceSources, Record};
use crate::engine::handle::lock;
use crate::engine::mover::{MigrationOrder, MigrationReport, Mover, Orders};
use crate::engine::plan::{self, StepPlan};
use crate::metrics::Work;

/// What serving is taken to wait for a switch: ranks exchange a few pointers.
const SWITCH_US: f64 = 50.0;

/// See the module above.
pub(in crate::engine) struct Balancer {
    sources: RebalanceSources,
    record: Arc<Mutex<Record>>,
    /// `None` when only others let experts move.
    decider: Option<Decider>,
    /// The step that runs next.
    next_step: u64,
    /// Experts are on their way on the engine's own decision.
    own: bool,
}

/// What decides by itself.
struct Decider {
    rebalancer: Rebalancer,
    planner: Planner,
    row_time: RowTime,
    /// Time of all ranks in their experts up to the last step.
    expert_time: Duration,
}

impl Balancer {
    /// Begins to count at the load so far.
    pub fn new(sources: RebalanceSources, record: Arc<Mutex<Record>>, placement: &Placement) -> Balancer {
        let options = sources.options;
        lock(&record).begin(options, sources.split);
        let cluster =
            ClusterShape { ranks: placement.ranks(), redundant: placement.slots() - placement.experts() };
        let decider = options.settings().map(|settings| Decider {
            rebalancer: Rebalancer::new(
                settings,
                options.policy,
                cluster,
                sources.split,
                sources.load.snapshot().to_window(),
            ),
            planner: Planner::start(),
            row_time: RowTime::default(),
            expert_time: Duration::ZERO,
        });
        Balancer { sources, record, decider, next_step: 0, own: false }
    }

    /// The ranks have answered a step: counts it, looks when that is due, and begins what was decided meanwhile.
    pub fn after_step(&mut self, plan: &StepPlan, mover: &mut Mover) {
        self.next_step = plan.step + 1;
        self.note_end(mover);
        let Some(decider) = &mut self.decider else { return };
        decider.after_step(plan, &self.sources, mover);
        match decider.verdict(self.next_step) {
            Ok(None) => {}
            Ok(Some(verdict)) => self.act(verdict, mover),
            Err(Gone) => {
                tracing::error!("rebalancing has stopped: its planner is gone");
                self.decider = None;
            }
        }
    }

    /// What the ranks are told for a migration before the next step.
    pub fn note_orders(&mut self, orders: &Orders, mover: &mut Mover) {
        if let Some(switch) = &orders.switch {
            let placement = Placement::clone(&switch.placement);
            self.tell(|step| Event::Switch(Switch { step, placement }));
        }
        self.note_end(mover);
    }

    /// Somebody outside lets experts move.
    pub fn note_order(&mut self, target: &Placement, mover: &Mover) {
        if let Some(decider) = &mut self.decider {
            decider.rebalancer.interrupted();
        }
        let current = mover.placement();
        let (experts, version) = (current.experts(), current.version());
        self.tell(|step| {
            Event::Decision(Box::new(Decision {
                step,
                trigger: OPERATOR.to_owned(),
                window_steps: 0,
                load: LoadWindow::new(current.layer_ids(), experts),
                current_version: version,
                inputs: Default::default(),
                forecast: Default::default(),
                chosen: Some(target.clone().with_version(version + 1)),
                reason: "an operator's placement".to_owned(),
            }))
        });
    }

    fn act(&mut self, verdict: Verdict, mover: &mut Mover) {
        let Some(decider) = &mut self.decider else { return };
        let moves = verdict.target.is_some();
        if moves && !mover.claim() {
            // Somebody outside has claimed the next migration, and their order is on its way.
            return;
        }
        decider.rebalancer.decided(&verdict);
        lock(&self.record).decided(&verdict, moves);
        self.tell(|_| Event::Decision(Box::new(verdict.to_decision())));
        let Verdict { trigger, reason, forecast, target, gains, .. } = verdict;
        let Some(target) = target else {
            tracing::debug!("rebalancing ({trigger}): experts stay: {reason}");
            return;
        };
        tracing::info!(
            "rebalancing ({trigger}): {} experts move: {reason}; balancedness {:.3} is to become {:.3}",
            forecast.moves,
            forecast.balance_before,
            forecast.balance_after
        );
        self.own = true;
        mover.begin(MigrationOrder { target, gains, caller: None });
        self.note_end(mover);
    }

    /// A migration may have ended.
    fn note_end(&mut self, mover: &mut Mover) {
        let Some(report) = mover.take_ended() else { return };
        lock(&self.record).ended(&report);
        let (step, own) = (self.next_step, std::mem::take(&mut self.own));
        let rebalancer = self.decider.as_mut().map(|decider| &mut decider.rebalancer);
        let MigrationReport { outcome, version, progress, duration, .. } = report;
        match outcome {
            Err(reason) => {
                rebalancer.into_iter().for_each(|rebalancer| rebalancer.failed(step));
                self.tell(|step| Event::Failure(Failure { step, reason }));
            }
            Ok(()) => {
                match rebalancer {
                    None => {}
                    Some(rebalancer) if own => rebalancer.moved(step),
                    Some(rebalancer) => rebalancer.overruled(step),
                }
                tracing::info!(
                    "placement {version} is in force: {} experts moved in {:.2} s",
                    progress.arrived,
                    duration.as_secs_f64()
                );
                self.tell(|step| {
                    Event::Moves(Moves {
                        step,
                        version,
                        slots: progress.arrived,
                        bytes: progress.bytes,
                        duration_us: duration.as_micros() as u64,
                    })
                });
            }
        }
    }

    fn tell(&self, event: impl FnOnce(u64) -> Event) {
        if let Some(recorder) = &self.sources.recorder {
            recorder.event(&event(self.next_step));
        }
    }
}

/// The planner's thread has died.
struct Gone;

impl Decider {
    fn after_step(&mut self, plan: &StepPlan, sources: &RebalanceSources, mover: &Mover) {
        self.note_time(plan, sources, mover.expert_tp());
        let next = plan.step + 1;
        match self.rebalancer.after_step() {
            Due::Nothing => {}
            Due::Part => self.rebalancer.end_part(next, &sources.load.snapshot().to_window()),
            Due::Look => {
                let counts = sources.load.snapshot().to_window();
                let inputs = inputs(self.row_time.take(), mover);
                self.planner.look(self.rebalancer.look(next, &counts, inputs, &mover.placement()));
            }
        }
    }

    /// The verdict of the last look, once it is there.
    fn verdict(&mut self, next_step: u64) -> Result<Option<Verdict>, Gone> {
        match self.planner.decided() {
            Err(()) => Err(Gone),
            Ok(None) => Ok(None),
            // An operator was faster.
            Ok(Some((step, _))) if !self.rebalancer.awaits(step) => Ok(None),
            Ok(Some((_, Ok(verdict)))) => Ok(Some(verdict)),
            Ok(Some((_, Err(error)))) => {
                tracing::warn!("rebalancing could not plan: {error}");
                self.rebalancer.failed(next_step);
                Ok(None)
            }
        }
    }

    /// What the step's rows took in the experts of all ranks.
    fn note_time(&mut self, plan: &StepPlan, sources: &RebalanceSources, expert_tp: usize) {
        let total: Duration = sources.meters.iter().map(|meter| meter.spent(Work::Expert)).sum();
        let us = total.saturating_sub(self.expert_time).as_secs_f64() * 1e6;
        self.expert_time = total;
        let tokens = [plan::Phase::Prefill, plan::Phase::Decode].map(|phase| plan.rows_in(phase) as u64);
        let rows = (sources.top_k * self.rebalancer.layers() * expert_tp) as f64;
        self.row_time.add(us, (tokens[0] + tokens[1]) as f64 * rows, tokens);
    }
}

/// The numbers of a look that are measured.
fn inputs(row_us: [f64; 2], mover: &Mover) -> Inputs {
    let parts = mover.expert_tp() as f64;
    Inputs {
        row_us,
        expert_bytes: mover.expert_bytes() as f64 * parts,
        migration_bytes_per_us: mover.bytes_per_second() / 1e6 * parts,
        switch_us: SWITCH_US,
    }
}
