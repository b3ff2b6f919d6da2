//! `router-sim split`: a recorded load, shared out among the slots of a placement.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use router_sim::formats::write;
use router_sim::load::{LoadWindow, balancedness};
use router_sim::placement::{Expected, Placement};
use router_sim::split::{Shares, Split};
use router_sim::{Error, Result};

use super::input::InputFlags;

const EXAMPLES: &str = "\
Examples:
  Tokens of each slot when the largest rank load is as small as this placement allows:
    router-sim split --load load.npy --placement placement.json --ranks 32 --split exact --out tokens.npy
  For decode, where reading an expert takes as long as computing 200 of its tokens:
    router-sim split --load load.npy --placement p.json --ranks 32 --split activated --expert-cost 200 --out t.npy

The output is int64 [layers, slots], slots rank-major. Loads with several steps are summed over the steps.";

/// What to share out.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Record whose tokens are shared out, in any format that `router-sim convert --help` lists
    #[arg(long, value_name = "FILE")]
    load: PathBuf,
    /// Placement file: moeyard's, or SGLang's map alone
    #[arg(long, value_name = "PLACEMENT.json")]
    placement: PathBuf,
    /// Expert-parallel ranks; a placement made for another number is refused
    #[arg(long, value_name = "G")]
    ranks: Option<usize>,
    /// How replicas share their expert's tokens
    #[arg(long, value_name = "SPLIT")]
    split: SplitName,
    /// With `activated`: the time to read one expert's weights, in any unit
    #[arg(long, value_name = "TIME", default_value_t = 300)]
    expert_cost: u32,
    /// With `activated`: the time to compute one token, in the same unit
    #[arg(long, value_name = "TIME", default_value_t = 1)]
    token_cost: u32,
    /// File to write
    #[arg(long, value_name = "TOKENS.npy")]
    out: PathBuf,
    #[command(flatten)]
    input: InputFlags,
}

/// A split by name.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum SplitName {
    /// The same number of tokens for every replica
    Even,
    /// Greedy: poured into the least loaded ranks
    Waterfill,
    /// The smallest largest rank load that the placement allows
    Exact,
    /// Few activated experts on each rank, bounded by tokens
    Activated,
}

pub fn run(arguments: Arguments) -> Result<()> {
    let Arguments { expert_cost, token_cost, .. } = arguments;
    let load = arguments.input.total_load(&arguments.load)?;
    let placement = read_placement(&arguments.placement, &load, arguments.ranks)?;
    let split = match arguments.split {
        SplitName::Even => Split::Even,
        SplitName::Waterfill => Split::WaterFill,
        SplitName::Exact => Split::Exact,
        SplitName::Activated => Split::Activated { expert_cost, token_cost },
    };
    let mut shares = Shares::default();
    let mut layers = Vec::with_capacity(load.layers());
    for layer in 0..load.layers() {
        let tokens: Vec<u64> = load.totals(layer).collect();
        layers.push(shares.share(split, placement.layer(layer), &tokens)?.to_vec());
    }
    write::slot_tokens_npy(&arguments.out, &layers)?;
    super::print(&summary(&arguments.out, split, &placement, &layers))
}

/// A placement file for this load. A load without layer ids of its own takes the file's.
pub fn read_placement(path: &Path, load: &LoadWindow, ranks: Option<usize>) -> Result<Placement> {
    let file = Placement::read_file(path)?;
    let unnumbered = load.layer_ids().iter().copied().eq(0..load.layers());
    let own = file.layer_ids().filter(|ids| unnumbered && ids.len() == load.layers()).map(<[usize]>::to_vec);
    let layer_ids = own.as_deref().unwrap_or(load.layer_ids());
    file.check(&Expected { ranks, experts: load.experts(), layer_ids }).map_err(|error| match error {
        Error::Placement(why) => Error::Placement(format!("{}: {why}", path.display())),
        other => other,
    })
}

fn summary(out: &Path, split: Split, placement: &Placement, layers: &[Vec<u64>]) -> String {
    let on_ranks = |tokens: &[u64]| -> Vec<u64> {
        tokens.chunks(placement.slots_per_rank()).map(|held| held.iter().sum()).collect()
    };
    let reached: Vec<f64> = layers.iter().map(|tokens| balancedness(&on_ranks(tokens))).collect();
    let activated = |tokens: &[u64]| {
        let held = tokens.chunks(placement.slots_per_rank());
        held.map(|held| held.iter().filter(|n| **n > 0).count()).max().unwrap_or(0)
    };
    format!(
        "{}: {} layers x {} slots, split {split}\n  balancedness               mean {:.4}, worst layer {:.4}\n  activated experts, most    {}\n",
        out.display(),
        layers.len(),
        placement.slots(),
        reached.iter().sum::<f64>() / reached.len().max(1) as f64,
        reached.iter().copied().fold(1.0, f64::min),
        layers.iter().map(|tokens| activated(tokens)).max().unwrap_or(0)
    )
}
