//! `router-sim advise`: how many slots, which split, and is rebalancing worth it?

use std::path::PathBuf;

use clap::Args;
use router_sim::advise::Question;
use router_sim::placement::{Expected, Placement};
use router_sim::report::data::Run;
use router_sim::simulate::{Choice, sweep};
use router_sim::{Error, Result};

use super::findings::FindingsFlags;
use super::simulation::SimulationFlags;
use super::summary;

const EXAMPLES: &str = "\
Examples:
  What should a DeepSeek-V3 on 32 H200 do about this traffic?
    router-sim advise load.npy --model deepseek-v3 --cluster h200-2x8 --nodes 4 --ranks 32 --set expert-weights=fp8

  The placement that is served was made on Monday; would rebalancing every ten minutes have paid on Tuesday?
    router-sim advise --fit monday.moeroute --on tuesday.moeroute --ranks 8 --horizon 600

  Against the placement that is served now:
    router-sim advise trace.moeroute --ranks 8 --placement served.json --split even";

/// The question.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    #[command(flatten)]
    simulation: SimulationFlags,
    /// Expert-parallel ranks
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "What is served, and what may change")]
    ranks: usize,
    /// The placement that is served now [default: experts in order, without redundancy]
    #[arg(long, value_name = "FILE", help_heading = "What is served, and what may change")]
    placement: Option<PathBuf>,
    /// The split that is used now
    #[arg(
        long,
        value_name = "SPLIT",
        default_value = "even",
        help_heading = "What is served, and what may change"
    )]
    split: String,
    /// Splits that may be used, the cheapest first
    #[arg(
        long,
        value_name = "SPLIT,..",
        value_delimiter = ',',
        default_value = "even,exact,activated",
        help_heading = "What is served, and what may change"
    )]
    splits: Vec<String>,
    /// Policy that plans
    #[arg(
        long,
        value_name = "POLICY",
        default_value = "moeyard",
        help_heading = "What is served, and what may change"
    )]
    policy: String,
    /// Groups of experts that eplb-hierarchical and moeyard keep on a node
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "What is served, and what may change")]
    groups: usize,
    /// Redundant slots per layer to try [default: 0, 1, 2 and 4 per rank, as far as memory reaches]
    #[arg(
        long,
        value_name = "N,N",
        value_delimiter = ',',
        help_heading = "What is served, and what may change"
    )]
    redundant: Vec<usize>,
    /// Seconds of serving between two rebalances, for the verdict
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 600.0,
        help_heading = "What is served, and what may change"
    )]
    horizon: f64,
    #[command(flatten)]
    findings: FindingsFlags,
}

pub fn run(arguments: Arguments) -> Result<()> {
    let Arguments { ranks, horizon, .. } = arguments;
    if !(horizon.is_finite() && horizon > 0.0) {
        return Err(Error::Impossible(format!("--horizon {horizon} must be above 0 and finite")));
    }
    let simulation = arguments.simulation.prepare(ranks)?;
    let expected =
        Expected { ranks: Some(ranks), experts: simulation.experts(), layer_ids: simulation.layer_ids() };
    let placement = arguments.placement.as_ref().map(|file| Placement::read(file, &expected)).transpose()?;
    let splits: Result<Vec<_>> = arguments.splits.iter().map(|name| simulation.split(name, ranks)).collect();
    let question = Question {
        baseline: Choice {
            ranks,
            redundant: placement.as_ref().map_or(0, |p| p.slots() - p.experts()),
            policy: simulation.policy("linear", 1, ranks)?,
            placement,
            split: simulation.split(&arguments.split, ranks)?,
            rebalancing: None,
        },
        policy: simulation.policy(&arguments.policy, arguments.groups, ranks)?,
        splits: splits?,
        redundant: arguments.redundant,
        horizon_s: horizon,
    };
    let cost = simulation.cost(ranks)?;
    let layers = simulation.layer_ids().len();
    let choices = question.choices(simulation.experts(), layers, &simulation.cluster, &cost)?;
    let bar = super::input::points_bar(choices.len());
    let scenario = simulation.scenario();
    let threads = (simulation.threads / choices.len()).max(1);
    let mut runs: Vec<Run> = vec![Run::default(); choices.len()];
    let one = |choice: &Choice| scenario.run(choice, threads, &mut |_, _, _| Ok(()));
    sweep(&choices, simulation.threads, one, |index, run| {
        bar.inc(1);
        runs[index] = run;
        Ok(())
    })?;
    bar.finish_and_clear();
    let advice = question.answer(&choices, &runs, &cost);
    let chosen = choices.iter().find(|choice| choice.name() == advice.choice).expect("one of the choices");
    super::print(&format!("{}\n{}", summary::table(&runs), summary::of_advice(&advice)))?;
    let mut report = simulation.report(runs, ranks);
    report.pareto = scenario.pareto(chosen, &cost)?;
    report.advice = Some(advice);
    arguments.findings.write(&report)
}
