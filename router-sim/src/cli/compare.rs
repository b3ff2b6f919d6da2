//! `router-sim compare`: many alternatives on the same tokens, as a table.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use router_sim::report::data::Run;
use router_sim::simulate::{Choice, SweepFile, sweep};
use router_sim::{Error, Result};

use super::findings::FindingsFlags;
use super::replay::RebalancingFlags;
use super::simulation::{Simulation, SimulationFlags};
use super::summary;

const EXAMPLES: &str = "\
Examples:
  Which policy and split, fitted on one kind of traffic, holds on another?
    router-sim compare --fit 'record.npz#mmlu*' --on 'record.npz#sorry_bench' --ranks 8 --redundant 8 \\
      --policy linear,eplb,moeyard --split even,waterfill,exact

  How many redundant slots does DeepSeek-V3 need on 32 and 64 GPUs? Interrupt it and call it again: finished points stay.
    router-sim compare load.npy --ranks 32,64 --redundant 0,32,64 --policy moeyard --split even,exact \\
      --out sweep.jsonl

  What do rebalancing intervals bring?
    router-sim compare trace.moeroute --redundant 8 --policy moeyard --rebalance-interval 0,100,1000";

/// Alternatives: every combination of the listed values is run.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    #[command(flatten)]
    simulation: SimulationFlags,
    /// Expert-parallel ranks
    #[arg(
        long,
        value_name = "N,N",
        value_delimiter = ',',
        default_value = "8",
        help_heading = "Alternatives"
    )]
    ranks: Vec<usize>,
    /// Slots per layer over all ranks beyond one per expert
    #[arg(
        long,
        value_name = "N,N",
        value_delimiter = ',',
        default_value = "0",
        help_heading = "Alternatives"
    )]
    redundant: Vec<usize>,
    /// Placement policies
    #[arg(
        long,
        value_name = "POLICY,..",
        value_delimiter = ',',
        default_value = "linear,eplb,moeyard",
        help_heading = "Alternatives"
    )]
    policy: Vec<String>,
    /// Splits between replicas
    #[arg(
        long,
        value_name = "SPLIT,..",
        value_delimiter = ',',
        default_value = "even,exact",
        help_heading = "Alternatives"
    )]
    split: Vec<String>,
    /// Groups of experts that eplb-hierarchical and moeyard keep on a node
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Alternatives")]
    groups: usize,
    /// Steps between two looks at the load; 0 keeps the placement
    #[arg(
        long,
        value_name = "STEPS,..",
        value_delimiter = ',',
        default_value = "0",
        help_heading = "Rebalancing while serving"
    )]
    rebalance_interval: Vec<u64>,
    /// Steps of load that a look is at [default: the interval]
    #[arg(long, value_name = "STEPS,..", value_delimiter = ',', help_heading = "Rebalancing while serving")]
    window: Vec<u64>,
    #[command(flatten)]
    rebalancing: RebalancingFlags,
    /// Keep finished runs in this file, and do not run them again
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    findings: FindingsFlags,
}

/// Most runs of one sweep.
const MOST_POINTS: usize = 10_000;

pub fn run(arguments: Arguments) -> Result<()> {
    let most_ranks = arguments.ranks.iter().copied().max().unwrap_or(1);
    let simulation = arguments.simulation.prepare(most_ranks)?;
    let points = points(&arguments, &simulation)?;
    let (mut file, finished) = match &arguments.out {
        None => (None, BTreeMap::new()),
        Some(path) => {
            let shared = format!("{} {:?}", simulation.describe(), arguments.rebalancing);
            let (file, finished) = SweepFile::open(path, &shared)?;
            (Some(file), finished)
        }
    };
    let mut runs: Vec<Option<Run>> = points.iter().map(|(key, _)| finished.get(key).cloned()).collect();
    let missing: Vec<usize> = (0..points.len()).filter(|i| runs[*i].is_none()).collect();
    let threads_per_run = (simulation.threads / missing.len().max(1)).max(1);
    let scenario = simulation.scenario();
    let bar = super::input::points_bar(missing.len());
    let one = |index: &usize| scenario.run(&points[*index].1, threads_per_run, &mut |_, _, _| Ok(()));
    sweep(&missing, simulation.threads, one, |done, run| {
        let index = missing[done];
        if let Some(file) = &mut file {
            file.push(&points[index].0, &run)?;
        }
        bar.inc(1);
        runs[index] = Some(run);
        Ok(())
    })?;
    bar.finish_and_clear();
    let runs: Vec<Run> = runs.into_iter().map(|run| run.expect("found or run")).collect();
    super::print(&summary::table(&runs))?;
    arguments.findings.write(&simulation.report(runs, most_ranks))
}

/// Every combination with the text that names it in the sweep's file.
fn points(arguments: &Arguments, simulation: &Simulation) -> Result<Vec<(String, Choice)>> {
    let Arguments { ranks, redundant, policy, split, rebalance_interval, window, groups, .. } = arguments;
    let windows: Vec<Option<u64>> = match window.is_empty() {
        true => vec![None],
        false => window.iter().copied().map(Some).collect(),
    };
    let all =
        [ranks.len(), redundant.len(), policy.len(), split.len(), rebalance_interval.len(), windows.len()];
    let count = all.iter().try_fold(1usize, |product, n| product.checked_mul(*n)).unwrap_or(usize::MAX);
    if count > MOST_POINTS {
        return Err(Error::Impossible(format!("{count} combinations exceed the limit of {MOST_POINTS}")));
    }
    let mut points: Vec<(String, Choice)> = Vec::with_capacity(count);
    for (&ranks, &redundant) in ranks.iter().flat_map(|r| redundant.iter().map(move |x| (r, x))) {
        for (policy, split) in policy.iter().flat_map(|p| split.iter().map(move |s| (p, s))) {
            for (&interval, &window) in
                rebalance_interval.iter().flat_map(|i| windows.iter().map(move |w| (i, w)))
            {
                let rebalancing = match interval {
                    0 => None,
                    _ => Some(arguments.rebalancing.settings(interval, window)?),
                };
                let window = rebalancing.map_or(0, |live| live.rebalancing.window);
                let key = format!(
                    "{policy} {split} ranks={ranks} redundant={redundant} interval={interval} window={window}"
                );
                let choice = Choice {
                    ranks,
                    redundant,
                    policy: simulation.policy(policy, *groups, ranks)?,
                    placement: None,
                    split: simulation.split(split, ranks)?,
                    rebalancing,
                };
                if points.iter().all(|(other, _)| *other != key) {
                    points.push((key, choice));
                }
            }
        }
    }
    Ok(points)
}
