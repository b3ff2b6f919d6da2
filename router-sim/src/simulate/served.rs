//! What a serving engine decided and moved, out of its trace: a replay follows its switches, makes its decisions again
//! from the tokens alone, and tells where it comes to anything else.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use crate::load::LoadWindow;
use crate::placement::{ClusterShape, Placement, PolicyName, RoundLimits, Rounds, rounds};
use crate::rebalance::{Due, Inputs, OPERATOR, Rebalancer, Rebalancing};
use crate::report::data::Rebalance;
use crate::split::Split;
use crate::stream::TokenBatch;
use crate::trace::{Decision, Event, Record, TraceHeader, TraceReader};
use crate::{Error, Result};

/// Header entries beside those of [`Rebalancing::to_header`].
pub mod header {
    /// Entry of [`TraceHeader::policy`](crate::trace::TraceHeader::policy): the split between replicas.
    pub const SPLIT: &str = "split";
    /// Entry of [`TraceHeader::cost`](crate::trace::TraceHeader::cost): experts that each rank receives before a placement
    /// switches.
    pub const STAGING_SLOTS: &str = "staging_slots";
}

/// The rebalancing of a recorded run.
#[derive(Debug, Clone)]
pub struct ServedRun {
    /// Placement that the run began with.
    pub placement: Placement,
    /// Split between replicas.
    pub split: Split,
    /// Ranks of the world; they own the rows.
    pub world: usize,
    rebalancing: Option<(PolicyName, Rebalancing)>,
    limits: RoundLimits,
    decisions: BTreeMap<u64, Decision>,
    /// All other events, orders of operators among them, as they were written, each with the step of the decision before.
    others: VecDeque<(Option<u64>, Event)>,
    steps_lost: u64,
}

impl ServedRun {
    /// Reads header and events of a trace.
    ///
    /// # Errors
    /// Those of the reader, with the file's name; [`Error::Impossible`] for a header entry that makes no sense.
    pub fn read(path: &Path) -> Result<ServedRun> {
        let in_file = |error| match error {
            Error::Trace { record, why } => Error::Record { path: path.into(), record, why },
            other => other,
        };
        let reader = TraceReader::open(path).map_err(in_file)?;
        let header = reader.header();
        let mut run = ServedRun {
            placement: header.placement.clone(),
            split: split(header)?,
            world: header.world(),
            rebalancing: Rebalancing::from_header(&header.policy)?,
            limits: limits(header)?,
            decisions: BTreeMap::new(),
            others: VecDeque::new(),
            steps_lost: 0,
        };
        let mut latest = None;
        for next in reader {
            let record = next.map_err(in_file)?;
            match record {
                Record::Step(_) => {}
                Record::Gap(gap) => run.steps_lost += gap.steps,
                Record::Event(Event::Decision(decision)) if decision.trigger != OPERATOR => {
                    latest = Some(decision.step);
                    run.decisions.insert(decision.step, *decision);
                }
                Record::Event(event) => run.others.push_back((latest, event)),
            }
        }
        Ok(run)
    }
}

impl ServedRun {
    /// The policy that its rebalancer planned with; `None` where nothing was rebalanced.
    pub fn policy(&self) -> Option<PolicyName> {
        self.rebalancing.map(|(policy, _)| policy)
    }
}

fn split(header: &TraceHeader) -> Result<Split> {
    Ok(match header.policy.get(header::SPLIT) {
        None => Split::default(),
        Some(name) => match name.parse()? {
            Split::Nearest { .. } => Split::Nearest { ranks_per_node: ranks_per_node(header) },
            other => other,
        },
    })
}

/// Consecutive ranks that share the first rank's node.
fn ranks_per_node(header: &TraceHeader) -> usize {
    let first = header.node_of_rank.first();
    header.node_of_rank.iter().take_while(|node| Some(*node) == first).count().max(1)
}

fn limits(header: &TraceHeader) -> Result<RoundLimits> {
    let staging = header.cost.get(header::STAGING_SLOTS).copied().unwrap_or(1.0);
    // An engine whose experts stay has none.
    let staging = staging.max(1.0);
    if !(1.0..=65536.0).contains(&staging) || staging.fract() != 0.0 {
        return Err(Error::Impossible(format!(
            "the trace's header entry {} is {staging}, not a whole number within 1..=65536",
            header::STAGING_SLOTS
        )));
    }
    Ok(RoundLimits { staging_per_rank: staging as usize, ranks_per_node: ranks_per_node(header) })
}

/// How well a replay agreed with the run that was recorded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Agreement {
    /// Decisions that were made again, those of operators not counted.
    pub decisions: u64,
    /// Of these, the ones that move experts.
    pub migrations: u64,
    /// Decisions of operators: they are followed.
    pub operators: u64,
    /// Placements that came into force.
    pub switches: u64,
    /// Migrations that the run gave up.
    pub failures: u64,
    /// Where the replay came to something else; the first ones.
    pub differences: Vec<String>,
}

/// Differences that are worth telling.
const MOST_DIFFERENCES: usize = 20;

/// Follows a recorded run.
#[derive(Debug, Clone)]
pub(super) struct Follower {
    run: ServedRun,
    rebalancer: Option<Rebalancer>,
    counts: LoadWindow,
    due: Due,
    /// The rounds that the replay expects.
    expected: Option<Rounds>,
    /// An operator's migration is under way.
    ordered: bool,
    pub agreement: Agreement,
    pub log: Vec<Rebalance>,
}

impl Follower {
    pub fn new(run: ServedRun) -> Self {
        let counts = LoadWindow::new(run.placement.layer_ids(), run.placement.experts());
        let cluster = ClusterShape {
            ranks: run.placement.ranks(),
            redundant: run.placement.slots() - run.placement.experts(),
        };
        let rebalancer = run
            .rebalancing
            .map(|(policy, settings)| Rebalancer::new(settings, policy, cluster, run.split, counts.clone()));
        let mut agreement = Agreement::default();
        if run.steps_lost > 0 {
            agreement.differences.push(format!("{} steps are missing in the trace", run.steps_lost));
        }
        Follower {
            run,
            rebalancer,
            counts,
            due: Due::Nothing,
            expected: None,
            ordered: false,
            agreement,
            log: Vec::new(),
        }
    }

    /// Layers whose new placement has not arrived.
    pub fn layers_in_flight(&self) -> usize {
        self.expected.as_ref().map_or(0, Rounds::layers_left)
    }

    /// What happened before `step` runs.
    pub fn before_step(&mut self, step: u64, placement: &mut Placement) -> Result<()> {
        self.follow(step, true, placement);
        match std::mem::replace(&mut self.due, Due::Nothing) {
            Due::Nothing => {}
            Due::Part => self.end_part(step),
            // Where the run did not look, its rebalancer was still busy: the look is due again after the next step.
            Due::Look if self.run.decisions.contains_key(&step) => {}
            Due::Look => self.end_full_part(step),
        }
        if let Some(decision) = self.run.decisions.remove(&step) {
            self.decide(&decision, placement)?;
        }
        self.follow(step, false, placement);
        Ok(())
    }

    /// The load of the step that ran.
    pub fn after_step(&mut self, batch: &TokenBatch) {
        batch.add_to(&mut self.counts);
        if let Some(rebalancer) = &mut self.rebalancer {
            self.due = rebalancer.after_step();
        }
    }

    fn end_part(&mut self, step: u64) {
        if let Some(rebalancer) = &mut self.rebalancer {
            rebalancer.end_part(step, &self.counts);
        }
    }

    fn end_full_part(&mut self, step: u64) {
        if self.rebalancer.as_ref().is_some_and(Rebalancer::part_is_full) {
            self.end_part(step);
        }
    }

    fn differ(&mut self, what: String) {
        if self.agreement.differences.len() < MOST_DIFFERENCES {
            self.agreement.differences.push(what);
        }
    }

    /// Makes a decision again.
    fn decide(&mut self, decision: &Decision, placement: &Placement) -> Result<()> {
        let step = decision.step;
        self.agreement.decisions += 1;
        let Some(rebalancer) = self.rebalancer.as_mut().filter(|rebalancer| !rebalancer.is_busy()) else {
            self.differ(format!("step {step}: the run decided where the replay has nothing to decide"));
            return Ok(());
        };
        let inputs = Inputs::from_map(&decision.inputs)?;
        let verdict = rebalancer.look(step, &self.counts, inputs, placement).decide()?;
        rebalancer.decided(&verdict);
        let again = verdict.to_decision();
        if let Some(target) = &verdict.target {
            self.agreement.migrations += 1;
            let rounds = rounds(placement, target, &verdict.gains, self.run.limits);
            self.log.push(Rebalance {
                step,
                done: None,
                trigger: verdict.trigger.clone(),
                transfers: verdict.forecast.moves,
                bytes: verdict.forecast.bytes,
                before: verdict.forecast.balance_before,
                after: verdict.forecast.balance_after,
            });
            self.expected = Some(rounds);
        }
        if let Some(what) = difference(decision, &again) {
            self.differ(format!("step {step}: {what}"));
        }
        Ok(())
    }

    /// Applies what was written up to `step`, as far as it was written before that step's decision, or also behind.
    fn follow(&mut self, step: u64, before_decision: bool, placement: &mut Placement) {
        loop {
            let due = |(decided, event): &(Option<u64>, Event)| {
                event.step() <= step && !(before_decision && *decided == Some(step))
            };
            let Some((_, event)) = self.run.others.pop_front_if(|next| due(next)) else { return };
            match event {
                Event::Switch(switch) => self.switch(switch.step, switch.placement, placement),
                Event::Failure(failure) => {
                    self.agreement.failures += 1;
                    (self.expected, self.ordered) = (None, false);
                    if let Some(rebalancer) = &mut self.rebalancer {
                        rebalancer.failed(failure.step);
                    }
                }
                // An operator's: all others are among the decisions.
                Event::Decision(_) => {
                    self.agreement.operators += 1;
                    self.ordered = true;
                    if let Some(rebalancer) = &mut self.rebalancer {
                        rebalancer.interrupted();
                    }
                }
                Event::Moves(moves) => {
                    if let Some(rebalancer) = &mut self.rebalancer
                        && self.ordered
                    {
                        rebalancer.overruled(moves.step);
                    }
                    self.ordered = false;
                }
            }
        }
    }

    fn switch(&mut self, step: u64, to: Placement, placement: &mut Placement) {
        self.agreement.switches += 1;
        if self.ordered {
            // Its rounds are its own.
        } else if let Some(expected) = &mut self.expected {
            let round = expected.next().map(|round| round.placement);
            if expected.layers_left() == 0 {
                self.expected = None;
                if let Some(rebalancer) = &mut self.rebalancer {
                    rebalancer.moved(step);
                }
                if let Some(last) = self.log.last_mut() {
                    last.done = Some(step);
                }
            }
            if round.as_ref() != Some(&to) {
                self.differ(format!("step {step}: the run switched to another placement than the replay"));
            }
        } else {
            self.differ(format!("step {step}: the run switched to a placement that nobody decided on"));
        }
        *placement = to;
    }
}

/// The first thing in which a decision that was made again is not the one that was recorded.
fn difference(recorded: &Decision, again: &Decision) -> Option<String> {
    let words = |what: &str, recorded: &dyn std::fmt::Debug, again: &dyn std::fmt::Debug| {
        Some(format!("the {what} was {recorded:?}, the replay comes to {again:?}"))
    };
    if recorded.current_version != again.current_version {
        return words("placement in force", &recorded.current_version, &again.current_version);
    }
    if recorded.window_steps != again.window_steps {
        return words("window", &recorded.window_steps, &again.window_steps);
    }
    if recorded.load != again.load {
        return Some("the load that was looked at is not that of the recorded rows".into());
    }
    if recorded.trigger != again.trigger {
        return words("trigger", &recorded.trigger, &again.trigger);
    }
    if recorded.reason != again.reason {
        return words("reason", &recorded.reason, &again.reason);
    }
    if recorded.forecast != again.forecast {
        return words("forecast", &recorded.forecast, &again.forecast);
    }
    if recorded.chosen != again.chosen {
        return Some("the placement that was chosen is not the one that the replay chooses".into());
    }
    None
}
