//! `router-sim place`: where experts should live, and how good that is.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use router_sim::bounds;
use router_sim::load::LoadWindow;
use router_sim::placement::{
    ClusterShape, Eplb, Linear, Moeyard, Placement, PlacementPolicy, duplicates, transfers,
};
use router_sim::split::{MAX_TOKENS, Shares, even_balancedness};
use router_sim::{Error, Result};

use super::input::InputFlags;
use super::split::read_placement;

const EXAMPLES: &str = "\
Examples:
  Plan afresh for 32 ranks with 288 slots per layer (9 on each rank):
    router-sim place --load load.npy --ranks 32 --slots 288 --policy moeyard --out placement.json
  The published EPLB, groups of experts kept on a node:
    router-sim place --load load.npy --ranks 32 --slots 288 --nodes 4 --groups 8 --policy eplb-hierarchical --out p.json

  Repair a placement for a new load, at most 16 experts moved in each layer:
    router-sim place --load new.npy --ranks 32 --slots 288 --policy moeyard --from placement.json --max-transfers 16 --out p.json

Loads with several steps are summed over the steps, unless --windows keeps them apart.";

/// What to plan for.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Record to plan for, in any format that `router-sim convert --help` lists
    #[arg(long, value_name = "FILE")]
    load: PathBuf,
    /// Expert-parallel ranks
    #[arg(long, value_name = "G")]
    ranks: usize,
    /// Slots per layer over all ranks: experts and redundant copies; a multiple of the ranks
    #[arg(long, value_name = "R")]
    slots: usize,
    /// Nodes that the ranks are on, in runs of equal length; linear and eplb are blind to them
    #[arg(long, value_name = "N", default_value_t = 1)]
    nodes: usize,
    /// Groups of consecutive experts that a token's experts are limited to; linear and eplb are blind to them
    #[arg(long, value_name = "K", default_value_t = 1)]
    groups: usize,
    /// How to plan
    #[arg(long, value_name = "POLICY")]
    policy: PolicyName,
    /// Placement that is served now: transfers are counted from it
    #[arg(long, value_name = "PLACEMENT.json")]
    from: Option<PathBuf>,
    /// Change at most this many slots per layer of the placement that is served now
    #[arg(long, value_name = "K", requires = "from")]
    max_transfers: Option<usize>,
    /// Move at most this many bytes per layer
    #[arg(long, value_name = "BYTES", requires = "from", requires = "expert_bytes")]
    max_bytes: Option<u64>,
    /// Bytes of one expert's weights in one layer, to say what transfers cost
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    expert_bytes: Option<u64>,
    /// Plan for the sum over up to this many windows of each window's largest load, not for their total
    #[arg(long, value_name = "N", default_value_t = 1)]
    windows: usize,
    /// Expect each expert's load to drift by a factor exp(D x N(0,1)) and plan for that too
    #[arg(long, value_name = "D", default_value_t = 0.0)]
    drift: f64,
    /// Stop the search this close to the bound: 0.0001 is 0.01 %
    #[arg(long, value_name = "GAP", default_value_t = Moeyard::default().gap)]
    gap: f64,
    /// Ranks that must stay empty, as 3,17
    #[arg(long, value_name = "RANKS", value_delimiter = ',')]
    failed_ranks: Vec<usize>,
    /// Placement file to write
    #[arg(long, value_name = "PLACEMENT.json")]
    out: PathBuf,
    #[command(flatten)]
    input: InputFlags,
}

/// A policy by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PolicyName {
    /// Experts in order, blind to load
    Linear,
    /// The published EPLB, global policy
    Eplb,
    /// The published EPLB, groups kept whole on nodes (--nodes, --groups)
    EplbHierarchical,
    /// Search on windows, with few transfers; groups are kept whole on nodes where both are several
    Moeyard,
}

pub fn run(arguments: Arguments) -> Result<()> {
    check_policy_flags(&arguments)?;
    let mut windows = match arguments.windows {
        0 | 1 => vec![arguments.input.total_load(&arguments.load)?],
        most => arguments.input.windows(&arguments.load, most)?,
    };
    let mut load = sum(&windows)?;
    let cluster = cluster(&arguments, load.experts())?;
    let current = arguments.from.as_deref().map(|path| read_placement(path, &load, Some(arguments.ranks)));
    let current = current.transpose()?;
    if let Some(current) = current.as_ref().filter(|current| current.slots() != arguments.slots) {
        return Err(Error::Impossible(format!(
            "--from has {} slots per layer, --slots is {}",
            current.slots(),
            arguments.slots
        )));
    }
    if let Some(current) = &current {
        load = load.with_layer_ids(current.layer_ids())?;
        let renamed = windows.into_iter().map(|window| window.with_layer_ids(current.layer_ids()));
        windows = renamed.collect::<Result<_>>()?;
    }
    let policy: Box<dyn PlacementPolicy> = match arguments.policy {
        PolicyName::Linear => Box::new(Linear),
        PolicyName::Eplb => Box::new(Eplb::GLOBAL),
        PolicyName::EplbHierarchical => Box::new(Eplb::hierarchical(arguments.groups, arguments.nodes)),
        PolicyName::Moeyard => Box::new(moeyard(&arguments)),
    };
    let placement = policy.replan(&windows, current.as_ref(), &cluster)?;
    placement.write(&arguments.out)?;
    super::print(&summary(&arguments, &load, &placement, current.as_ref())?)
}

/// Flags that only one policy knows are refused with another.
fn check_policy_flags(arguments: &Arguments) -> Result<()> {
    let default = Moeyard::default();
    let own = [
        ("--max-transfers", arguments.max_transfers.is_some()),
        ("--max-bytes", arguments.max_bytes.is_some()),
        ("--windows", arguments.windows > 1),
        ("--drift", arguments.drift != default.drift),
        ("--gap", arguments.gap != default.gap),
        ("--failed-ranks", !arguments.failed_ranks.is_empty()),
    ];
    match own.iter().find(|(_, given)| *given) {
        Some((flag, _)) if arguments.policy != PolicyName::Moeyard => {
            Err(Error::Impossible(format!("{flag} needs --policy moeyard")))
        }
        _ => Ok(()),
    }
}

fn moeyard(arguments: &Arguments) -> Moeyard {
    let in_bytes = arguments
        .max_bytes
        .map(|bytes| Moeyard::transfers_within(bytes, arguments.expert_bytes.expect("clap requires it")));
    let limits = arguments.max_transfers.into_iter().chain(in_bytes);
    Moeyard {
        gap: arguments.gap,
        max_transfers: limits.min(),
        phase_shares: None,
        drift: arguments.drift,
        groups: arguments.groups,
        nodes: arguments.nodes,
        failed_ranks: arguments.failed_ranks.clone(),
    }
}

fn sum(windows: &[LoadWindow]) -> Result<LoadWindow> {
    let Some((first, others)) = windows.split_first() else {
        return Err(Error::Impossible("--load holds no window".into()));
    };
    let mut sum = first.clone();
    others.iter().try_for_each(|window| sum.merge(window))?;
    Ok(sum)
}

fn cluster(arguments: &Arguments, experts: usize) -> Result<ClusterShape> {
    let Arguments { ranks, slots, .. } = *arguments;
    if ranks == 0 {
        return Err(Error::Impossible("--ranks 0: at least 1".into()));
    }
    if slots < experts {
        return Err(Error::Impossible(format!(
            "--slots {slots}: at least one for each of {experts} experts"
        )));
    }
    if !slots.is_multiple_of(ranks) {
        let below = slots / ranks * ranks;
        let nearest = if below < experts { String::new() } else { format!("{below} or ") };
        return Err(Error::Impossible(format!(
            "--slots {slots} do not divide among {ranks} ranks; {nearest}{} do",
            below + ranks
        )));
    }
    Ok(ClusterShape { ranks, redundant: slots - experts })
}

/// The largest rank load under the best split. Counts beyond what can be split are halved until they can be.
fn best_split_load(shares: &mut Shares, placement: &Placement, layer: usize, tokens: &[u64]) -> Result<f64> {
    let sum: u128 = tokens.iter().map(|n| u128::from(*n)).sum();
    let halvings = (0..64).find(|halvings| sum >> halvings <= u128::from(MAX_TOKENS)).unwrap_or(63);
    let tokens: Vec<u64> = tokens.iter().map(|n| n >> halvings).collect();
    let optimum = shares.optimum(placement.layer(layer), &tokens)?;
    Ok(optimum.max_load * 2f64.powi(halvings))
}

/// A short table: mean and worst layer of what was reached and of what bounds it.
fn summary(
    arguments: &Arguments,
    load: &LoadWindow,
    placement: &Placement,
    current: Option<&Placement>,
) -> Result<String> {
    let even = even_balancedness(load, placement);
    let (mut best_split, mut bound, mut group_bound) = (Vec::new(), Vec::new(), Vec::new());
    let (groups, nodes) = (arguments.groups, arguments.nodes);
    let mut shares = Shares::default();
    for layer in 0..load.layers() {
        let tokens: Vec<u64> = load.totals(layer).collect();
        let mean = bounds::mean_load(&tokens, placement.ranks());
        let over = |max: f64| if max > 0.0 { mean / max } else { 1.0 };
        best_split.push(over(best_split_load(&mut shares, placement, layer, &tokens)?));
        if groups > 1 && nodes > 1 {
            let max = bounds::group_on_node_bound(&tokens, placement.ranks(), groups, nodes);
            group_bound.extend(max.ok().map(over));
        }
        bound.push(over(bounds::replica_bound(&tokens, placement.ranks(), placement.slots())));
    }
    let layers = load.layers().max(1) as f64;
    let row = |name: &str, values: &[f64]| {
        let mean = values.iter().sum::<f64>() / layers;
        let worst = values.iter().copied().fold(1.0, f64::min);
        format!("  {name:<34}{mean:>9.4}{worst:>14.4}\n")
    };
    let mut text = format!(
        "{}: {} layers x {} experts, {} ranks x {} slots\n\n  {:<34}{:>9}{:>14}\n",
        arguments.out.display(),
        load.layers(),
        load.experts(),
        placement.ranks(),
        placement.slots_per_rank(),
        "balancedness (1 is perfect)",
        "mean",
        "worst layer"
    );
    if let Some(current) = current {
        text += &row("before, even split", &even_balancedness(load, current));
    }
    text += &row("even split", &even);
    text += &row("best split of this placement", &best_split);
    text += &row("bound of any placement", &bound);
    // More groups than can be searched have no such bound.
    if !group_bound.is_empty() {
        text += &row("bound with groups kept on nodes", &group_bound);
    }
    let gap = even.iter().zip(&bound).map(|(even, bound)| bound / even - 1.0).sum::<f64>() / layers;
    text += &format!("\n  gap to the bound, mean   {:.3} %\n", gap * 100.0);
    text += &format!("  duplicates on a rank     {}\n", duplicates(placement));
    if let Some(current) = current {
        let moved = transfers(current, placement);
        let most =
            (0..load.layers()).map(|l| moved.iter().filter(|t| t.layer == l).count()).max().unwrap_or(0);
        text += &format!(
            "  transfers                {} in all, {:.1} per layer, at most {most} in one\n",
            moved.len(),
            moved.len() as f64 / layers
        );
        if let Some(bytes) = arguments.expert_bytes {
            text +=
                &format!("  bytes                    {:.3} GB\n", moved.len() as f64 * bytes as f64 / 1e9);
        }
    }
    Ok(text)
}
