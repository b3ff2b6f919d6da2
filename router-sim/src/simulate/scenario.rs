//! A scenario: tokens, the load that placements are fitted on, a model on a cluster. Each [`Choice`] of ranks, slots,
//! policy and split is one run of it.

use super::lane::LayerStep;
use super::losses::{Reference, losses};
use super::pareto::pareto;
use super::rebalance::LiveRebalancing;
use super::served::{Agreement, ServedRun};
use super::simulator::{Setup, Simulator, StepFigures};
use super::sources::Sources;
use crate::Result;
use crate::cost::{Constants, CostModel, ModelShape};
use crate::load::LoadWindow;
use crate::placement::{ClusterShape, Placement, PlanOptions, PolicyName, plan};
use crate::rebalance::Rebalancing;
use crate::report::data::{ParetoPoint, Run};
use crate::split::Split;
use crate::stream::{TokenBatch, TokenStream};
use crate::topology::Cluster;

/// Opens the tokens from their beginning; the argument is how many make a batch where the input has no steps.
pub type OpenTokens<'a> = dyn Fn(usize) -> Result<Box<dyn TokenStream>> + Sync + 'a;

/// What all runs share.
pub struct Scenario<'a> {
    /// The tokens.
    pub open: &'a OpenTokens<'a>,
    /// Tokens of a batch per rank, where the input has no steps.
    pub tokens_per_rank: f64,
    /// Steps to run; all when not given.
    pub steps: Option<u64>,
    /// Which rank owns which row.
    pub sources: Sources,
    /// What placements are fitted on, oldest first; at least one window.
    pub fit: &'a [LoadWindow],
    /// The load of the tokens that are run: what a placement with hindsight would be fitted on.
    pub hindsight: &'a LoadWindow,
    /// Where it runs.
    pub cluster: &'a Cluster,
    /// What runs.
    pub model: &'a ModelShape,
    /// What it costs.
    pub constants: &'a Constants,
    /// The policy that placements with hindsight are made by.
    pub reference: PolicyName,
}

/// One alternative.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Expert-parallel ranks.
    pub ranks: usize,
    /// Slots per layer over all ranks beyond one per expert.
    pub redundant: usize,
    /// Placement policy.
    pub policy: PolicyName,
    /// A placement to begin with, instead of one that the policy makes.
    pub placement: Option<Placement>,
    /// Split between replicas.
    pub split: Split,
    /// Rebalancing while serving.
    pub rebalancing: Option<LiveRebalancing>,
}

impl Choice {
    /// A short name that tells it from other choices.
    pub fn name(&self) -> String {
        let first = if self.placement.is_some() { "given" } else { self.policy.name() };
        let live = match &self.rebalancing {
            None => String::new(),
            Some(LiveRebalancing { rebalancing: Rebalancing { interval, window, .. }, .. }) => {
                match interval == window {
                    true => format!(" every {interval}"),
                    false => format!(" every {interval} on {window}"),
                }
            }
        };
        format!("{first} +{} {} on {}{live}", self.redundant, self.split.name(), self.ranks)
    }
}

/// Sees every step of a run: its number, what it took, and what each layer did.
pub type Observer<'a> =
    dyn FnMut(u64, &StepFigures, &mut dyn ExactSizeIterator<Item = &LayerStep>) -> Result<()> + 'a;

impl Scenario<'_> {
    /// The placement that a run begins with.
    fn first_placement(&self, choice: &Choice) -> Result<Placement> {
        let shape = ClusterShape { ranks: choice.ranks, redundant: choice.redundant };
        match &choice.placement {
            Some(placement) => Ok(placement.clone()),
            None => plan(choice.policy, self.fit, &shape, None, PlanOptions::default()),
        }
    }

    /// What moving experts from a choice's placement to one for the tokens that are run would bring, for few transfers
    /// and many.
    ///
    /// # Errors
    /// Those of the policies.
    pub fn pareto(&self, choice: &Choice, cost: &CostModel) -> Result<Vec<ParetoPoint>> {
        let first = self.first_placement(choice)?;
        pareto(self.reference, &first, self.hindsight, choice.split, cost.expert_bytes())
    }

    /// Runs one alternative.
    ///
    /// # Errors
    /// Those of the input, of the policy, and of a cluster that is too small.
    pub fn run(&self, choice: &Choice, threads: usize, observer: &mut Observer<'_>) -> Result<Run> {
        Ok(self.simulate(choice, None, threads, observer)?.0)
    }

    /// Runs what a recorded run did, placements and all; its tokens are those of the scenario.
    ///
    /// # Errors
    /// As [`Scenario::run`].
    pub fn run_as_served(
        &self,
        choice: &Choice,
        served: ServedRun,
        threads: usize,
        observer: &mut Observer<'_>,
    ) -> Result<(Run, Agreement)> {
        let (run, agreement) = self.simulate(choice, Some(served), threads, observer)?;
        Ok((run, agreement.expect("a recorded run is followed")))
    }

    fn simulate(
        &self,
        choice: &Choice,
        served: Option<ServedRun>,
        threads: usize,
        observer: &mut Observer<'_>,
    ) -> Result<(Run, Option<Agreement>)> {
        let cost = CostModel::new(self.cluster, choice.ranks, self.model, self.constants)?;
        let shape = ClusterShape { ranks: choice.ranks, redundant: choice.redundant };
        let first = self.first_placement(choice)?;
        let hindsight = std::slice::from_ref(self.hindsight);
        let with_hindsight = |policy| plan(policy, hindsight, &shape, None, PlanOptions::default());
        let best = with_hindsight(self.reference)?;
        let reference = match choice.policy.kept_groups() {
            None => Reference::new(best, self.hindsight),
            Some((groups, nodes)) => {
                let ruled = with_hindsight(PolicyName::Moeyard { groups, nodes })?;
                Reference::new(ruled, self.hindsight).without_rule(best, self.hindsight, groups, nodes)
            }
        };
        let setup = Setup {
            name: choice.name(),
            policy: choice.policy,
            split: choice.split,
            redundant: choice.redundant,
            rebalancing: choice.rebalancing,
            sources: self.sources,
            threads,
        };
        let rows = (self.tokens_per_rank * choice.ranks as f64).round().max(1.0) as usize;
        let mut tokens = (self.open)(rows)?;
        let mut run = Simulator::new(&setup, self.cluster, &cost, tokens.shape(), first.clone())?;
        run.compare_with(&reference);
        if let Some(served) = served {
            run.follow(served);
        }
        let mut batch = TokenBatch::default();
        let mut last_step = 0;
        for step in 0..self.steps.unwrap_or(u64::MAX) {
            if !tokens.next_batch(&mut batch)? {
                break;
            }
            last_step = batch.step;
            let figures = run.step(&batch)?;
            observer(step, &figures, &mut run.last_step())?;
        }
        let agreement = run.agreement(last_step + 1)?;
        let levels = run.levels();
        let mut fitted_on = self.fit[0].clone();
        for window in &self.fit[1..] {
            fitted_on.merge(window)?;
        }
        let mut run = run.finish(&fitted_on, &first);
        run.losses = losses(&run, &levels, &reference, &first, &cost);
        Ok((run, agreement))
    }
}
