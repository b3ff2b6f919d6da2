//! Real records, in the folder that `MOEYARD_TRACES` names, and what is made of them.

use std::path::{Path, PathBuf};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use router_sim::formats::{self, Options};
use router_sim::load::{LoadWindow, Phase, balancedness};
use router_sim::placement::Placement;
use router_sim::split::{Shares, Split};
use router_sim::stream::TokenBatch;

/// The folder of real records, or a word on standard error that there is none.
pub fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("MOEYARD_TRACES").map(PathBuf::from).filter(|folder| folder.is_dir());
    if folder.is_none() {
        eprintln!("skipped: MOEYARD_TRACES names no folder of real records");
    }
    folder
}

/// DeepSeek-V3-0324 on MMLU: 58 layers x 256 experts.
pub fn deepseek(folder: &Path) -> LoadWindow {
    let path = folder.join("deepseek_v3_0324_mmlu_4k.npy");
    formats::read_total(&path, &Options::default()).unwrap().0
}

fn labelled(label: &str) -> Options {
    Options { labels: vec![label.into()], ..Options::default() }
}

/// gpt-oss-20b: the load of all tokens whose label begins like this, 24 layers x 32 experts.
pub fn gpt_oss_load(folder: &Path, label: &str) -> LoadWindow {
    formats::read_total(&folder.join("gpt_oss_20b_decode.npz"), &labelled(label)).unwrap().0
}

/// gpt-oss-20b: tokens with this label, shuffled, in batches; counts `[batches][layers * experts]`.
pub fn gpt_oss_batches(folder: &Path, label: &str, tokens_per_batch: usize) -> Vec<Vec<u64>> {
    let mut stream = formats::open_tokens(&folder.join("gpt_oss_20b_decode.npz"), &labelled(label)).unwrap();
    let (layers, experts, top_k) = (stream.shape().layers(), 32, stream.shape().top_k);
    let (mut batch, mut tokens) = (TokenBatch::default(), Vec::new());
    while stream.next_batch(&mut batch).unwrap() {
        for row in 0..batch.rows.len() {
            let of = |layer| &batch.layer(layer, layers)[row * top_k..(row + 1) * top_k];
            tokens.push((0..layers).flat_map(|l| of(l).iter().map(move |id| (l, *id))).collect::<Vec<_>>());
        }
    }
    let mut generator = ChaCha8Rng::seed_from_u64(0);
    for i in (1..tokens.len()).rev() {
        tokens.swap(i, generator.random_range(0..=i));
    }
    let count = |batch: &[Vec<(usize, u16)>]| {
        let mut counts = vec![0; layers * experts];
        batch.iter().flatten().for_each(|(layer, id)| counts[layer * experts + usize::from(*id)] += 1);
        counts
    };
    tokens.chunks_exact(tokens_per_batch).map(count).collect()
}

/// Every expert's load times exp(0.25 N(0,1)): about as far as one run of a benchmark is from another.
pub fn drifted(load: &LoadWindow, seed: u64) -> LoadWindow {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut drifted = load.clone();
    for layer in 0..load.layers() {
        for n in drifted.counts_mut(Phase::Prefill, layer) {
            let normal: f64 = StandardNormal.sample(&mut generator);
            *n = (*n as f64 * (0.25 * normal).exp()).round() as u64;
        }
    }
    drifted
}

/// So many assignments of one layer drawn by its load.
pub fn draw(tokens: &[u64], assignments: usize, generator: &mut ChaCha8Rng) -> Vec<u64> {
    let mut ends = tokens.to_vec();
    (1..ends.len()).for_each(|e| ends[e] += ends[e - 1]);
    let total = *ends.last().unwrap();
    let mut drawn = vec![0; tokens.len()];
    for _ in 0..assignments {
        let token = generator.random_range(0..total);
        drawn[ends.partition_point(|end| *end <= token)] += 1;
    }
    drawn
}

/// Balancedness of one layer's tokens under a split.
pub fn reached(
    shares: &mut Shares,
    split: Split,
    placement: &Placement,
    layer: usize,
    tokens: &[u64],
) -> f64 {
    let slots = shares.share(split, placement.layer(layer), tokens).unwrap();
    balancedness(
        &slots.chunks(placement.slots_per_rank()).map(|held| held.iter().sum()).collect::<Vec<u64>>(),
    )
}

/// Mean over layers of one drawn batch each, 64 tokens x 8 experts per rank.
pub fn reached_by_batches(load: &LoadWindow, placement: &Placement, split: Split, seed: u64) -> f64 {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut shares = Shares::default();
    let mut of_layer = |layer| {
        let tokens: Vec<u64> = load.totals(layer).collect();
        let batch = draw(&tokens, placement.ranks() * 64 * 8, &mut generator);
        reached(&mut shares, split, placement, layer, &batch)
    };
    (0..load.layers()).map(&mut of_layer).sum::<f64>() / load.layers() as f64
}

pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}
