//! `router-sim replay`: one placement, policy and split on a stream of tokens.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use router_sim::formats::source::write_text;
use router_sim::placement::{Expected, Placement, PolicyName};
use router_sim::rebalance::{Rebalancing, Trigger};
use router_sim::simulate::{Agreement, Choice, LayerStep, LiveRebalancing, ServedRun, StepFigures};
use router_sim::{Error, Result};

use super::findings::FindingsFlags;
use super::simulation::{Simulation, SimulationFlags};
use super::summary;

const EXAMPLES: &str = "\
Examples:
  What does linear placement cost a recorded run on 8 GPUs?
    router-sim replay trace.moeroute --ranks 8

  8 redundant slots and the exact split; placements fitted on yesterday:
    router-sim replay --fit monday.moeroute --on tuesday.moeroute --ranks 8 --redundant 8 --policy moeyard --split exact

  Tokens drawn from a load matrix, DeepSeek-V3 in FP8 on four nodes, rebalanced every 50 steps:
    router-sim replay load.npy --model deepseek-v3 --ranks 32 --redundant 32 --policy moeyard --max-transfers 16 \\
      --set expert-weights=fp8 --set dispatch=fp8 --set wire=node --rebalance-interval 50

  A run that was served with rebalancing: make all its decisions again, and tell whether they are the same
    router-sim replay trace.moeroute --as-served

  Everything found, for `router-sim report` and for programs:
    router-sim replay trace.moeroute --ranks 8 --json run.json --layer-steps layers.csv";

const LAYER_STEPS_HEADER: &str = "step,layer,rows,max_rows,activated,max_activated,actual,best_split,bound,dispatch_us,expert_us,combine_us\n";

/// One run.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    #[command(flatten)]
    simulation: SimulationFlags,
    /// Follow the recorded run: its ranks, split and placements, with every decision of its rebalancer made again from
    /// the tokens; anything that comes out differently is an error
    #[arg(long, conflicts_with_all = ["ranks", "redundant", "policy", "placement", "split", "groups", "rebalance_interval", "fit", "steps"])]
    as_served: bool,
    /// Expert-parallel ranks
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Placement and split")]
    ranks: usize,
    /// Slots per layer over all ranks beyond one per expert
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Placement and split")]
    redundant: usize,
    /// Placement policy: linear, eplb, eplb-hierarchical, moeyard
    #[arg(long, value_name = "POLICY", default_value = "linear", help_heading = "Placement and split")]
    policy: String,
    /// Begin with this placement instead of one that the policy makes
    #[arg(long, value_name = "FILE", help_heading = "Placement and split")]
    placement: Option<PathBuf>,
    /// Split between replicas: even, random, nearest, waterfill, exact, activated
    #[arg(long, value_name = "SPLIT", default_value = "even", help_heading = "Placement and split")]
    split: String,
    /// Groups of experts that eplb-hierarchical and moeyard keep on a node
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Placement and split")]
    groups: usize,
    /// Rebalance while serving: look at the load every so many steps
    #[arg(long, value_name = "STEPS", help_heading = "Rebalancing while serving")]
    rebalance_interval: Option<u64>,
    /// Steps of load that a look is at [default: the interval]
    #[arg(
        long,
        value_name = "STEPS",
        requires = "rebalance_interval",
        help_heading = "Rebalancing while serving"
    )]
    window: Option<u64>,
    #[command(flatten)]
    rebalancing: RebalancingFlags,
    #[command(flatten)]
    findings: FindingsFlags,
    /// Write a line per step and layer as CSV
    #[arg(long, value_name = "FILE")]
    layer_steps: Option<PathBuf>,
}

/// Rebalancing while serving.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Rebalancing while serving")]
pub struct RebalancingFlags {
    /// Parts of the window that are planned on one by one
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub window_parts: usize,
    /// Replan only when the window's balancedness is below this
    #[arg(long, value_name = "RATIO")]
    pub below: Option<f64>,
    /// After a rebalance, wait until balancedness was above this once [default: --below]
    #[arg(long, value_name = "RATIO", requires = "below")]
    pub rearm: Option<f64>,
    /// Least part of a layer's expert time that a plan must save to move the layer's experts
    #[arg(long, value_name = "RATIO", default_value_t = 0.01)]
    pub min_gain: f64,
    /// Experts that may move per layer and rebalance
    #[arg(long, value_name = "N")]
    pub max_transfers: Option<usize>,
    /// Experts that each rank receives before a placement switches
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub staging_slots: usize,
    /// Serving waits for the weights instead of going on meanwhile
    #[arg(long)]
    pub synchronous: bool,
}

impl RebalancingFlags {
    /// What they stand for, with a look every `interval` steps.
    pub fn settings(&self, interval: u64, window: Option<u64>) -> Result<LiveRebalancing> {
        let rebalancing = Rebalancing {
            interval,
            window: window.unwrap_or(interval),
            parts: self.window_parts,
            trigger: match self.below {
                None => Trigger::Interval,
                Some(below) => Trigger::Balance { below, rearm: self.rearm.unwrap_or(below) },
            },
            min_gain: self.min_gain,
            max_transfers: self.max_transfers,
        };
        let settings =
            LiveRebalancing { rebalancing, staging_slots: self.staging_slots, synchronous: self.synchronous };
        settings.check()?;
        Ok(settings)
    }
}

pub fn run(arguments: Arguments) -> Result<()> {
    let served = match arguments.as_served {
        true => Some(ServedRun::read(&arguments.simulation.input().0)?),
        false => None,
    };
    let ranks = served.as_ref().map_or(arguments.ranks, |served| served.placement.ranks());
    let simulation = arguments.simulation.prepare(ranks)?;
    let scenario = simulation.scenario();
    let choice = match &served {
        None => choice(&arguments, &simulation)?,
        Some(served) => served_choice(served),
    };
    let mut lines = arguments.layer_steps.is_some().then(|| LAYER_STEPS_HEADER.to_owned());
    let layer_ids = simulation.layer_ids();
    let mut observer = |step, _: &StepFigures, layers: &mut dyn ExactSizeIterator<Item = &LayerStep>| {
        let Some(lines) = &mut lines else { return Ok(()) };
        for (layer, id) in layers.zip(layer_ids) {
            let (actual, best, bound) = (layer.actual(ranks), layer.best_split(ranks), layer.bound(ranks));
            writeln!(
                lines,
                "{step},{id},{},{},{},{},{actual:.6},{best:.6},{bound:.6},{:.3},{:.3},{:.3}",
                layer.rows,
                layer.max_rows,
                layer.activated,
                layer.max_activated,
                layer.dispatch_us,
                layer.expert_us,
                layer.combine_us
            )
            .expect("a String takes everything");
        }
        Ok(())
    };
    let (run, agreement) = match served {
        None => (scenario.run(&choice, simulation.threads, &mut observer)?, None),
        Some(served) => {
            let (run, agreement) =
                scenario.run_as_served(&choice, served, simulation.threads, &mut observer)?;
            (run, Some(agreement))
        }
    };
    if let (Some(path), Some(lines)) = (&arguments.layer_steps, &lines) {
        write_text(path, lines)?;
    }
    super::print(&summary::of_run(&run))?;
    arguments.findings.write(&simulation.report(vec![run], ranks))?;
    agreement.map_or(Ok(()), tell)
}

/// What the flags describe.
fn choice(arguments: &Arguments, simulation: &Simulation) -> Result<Choice> {
    let Arguments { ranks, redundant, .. } = *arguments;
    let expected =
        Expected { ranks: Some(ranks), experts: simulation.experts(), layer_ids: simulation.layer_ids() };
    let placement = arguments.placement.as_ref().map(|file| Placement::read(file, &expected)).transpose()?;
    Ok(Choice {
        ranks,
        redundant: placement.as_ref().map_or(redundant, |p| p.slots() - p.experts()),
        policy: simulation.policy(&arguments.policy, arguments.groups, ranks)?,
        placement,
        split: simulation.split(&arguments.split, ranks)?,
        rebalancing: arguments
            .rebalance_interval
            .map(|interval| arguments.rebalancing.settings(interval, arguments.window))
            .transpose()?,
    })
}

/// What was served; its rebalancing comes with the recorded run.
fn served_choice(served: &ServedRun) -> Choice {
    let placement = served.placement.clone();
    Choice {
        ranks: placement.ranks(),
        redundant: placement.slots() - placement.experts(),
        policy: served.policy().unwrap_or(PolicyName::Linear),
        split: served.split,
        placement: Some(placement),
        rebalancing: None,
    }
}

/// Says how the replay agrees with the run that was recorded.
///
/// # Errors
/// [`Error::Impossible`] with the differences.
fn tell(agreement: Agreement) -> Result<()> {
    let Agreement { decisions, migrations, operators, switches, failures, differences } = agreement;
    if !differences.is_empty() {
        return Err(Error::Impossible(format!("not as served:\n  {}", differences.join("\n  "))));
    }
    super::print(&format!(
        "as served: {decisions} decisions made again ({migrations} move experts), all alike; {operators} orders of operators, \
         {switches} switches, {failures} failed migrations followed\n"
    ))
}
