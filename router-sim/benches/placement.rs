//! Placement and split on real records: quality and time, with the published baselines beside them.
//! `MOEYARD_TRACES=FOLDER cargo bench -p router-sim --bench placement`
//!
//! Times are the best and the median of many rounds of all layers. Baselines in brackets: DeepSeek's eplb.py (torch) and
//! vLLM's numpy port, on another machine.

#[path = "../tests/records/mod.rs"]
mod records;

use std::hint::black_box;
use std::time::Instant;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use records::mean;
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Eplb, Moeyard, Placement, PlacementPolicy, duplicates, transfers};
use router_sim::split::{Shares, Split, SplitPlan, even_balancedness};

fn main() {
    let Some(folder) = records::folder() else { return };
    let load = records::deepseek(&folder);
    planned(&load);
    split(&load);
    drifted(&load);
    other_dataset(&folder);
}

/// Milliseconds of a call: best and median.
fn time<T>(rounds: usize, mut call: impl FnMut() -> T) -> (f64, f64) {
    let mut times: Vec<f64> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            black_box(call());
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[0], times[rounds / 2])
}

fn planned(load: &LoadWindow) {
    println!(
        "plan, DeepSeek-V3 58 x 256   EPLB ms (torch / numpy)        balance   moeyard ms        balance duplicates"
    );
    let cases = [
        (8, 264, "336 / 46"),
        (16, 272, "362 / 23"),
        (32, 288, "596 / 25"),
        (64, 320, "1149 / 35"),
        (144, 288, "1503 / 27"),
    ];
    for (ranks, slots, baseline) in cases {
        let cluster = ClusterShape { ranks, redundant: slots - load.experts() };
        let (published, own) = (Eplb::GLOBAL, Moeyard::default());
        let balance = |policy: &dyn PlacementPolicy| policy.place(load, &cluster).unwrap();
        let (theirs, ours) = (balance(&published), balance(&own));
        let (eplb, moeyard) = (time(30, || balance(&published)), time(30, || balance(&own)));
        println!(
            "  {ranks:>3} ranks {slots} slots        {:>5.2} {:>5.2} ({baseline:>9})   {:.4}   {:>6.2} {:>6.2}   {:.5}   {}",
            eplb.0,
            eplb.1,
            mean(&even_balancedness(load, &theirs)),
            moeyard.0,
            moeyard.1,
            mean(&even_balancedness(load, &ours)),
            duplicates(&ours)
        );
    }
}

fn plan(load: &LoadWindow, policy: &dyn PlacementPolicy, ranks: usize, slots: usize) -> Placement {
    policy.place(load, &ClusterShape { ranks, redundant: slots - load.experts() }).unwrap()
}

/// Quotas of 32 source ranks with 64 tokens x 8 experts each, and shares of slots alone.
fn split(load: &LoadWindow) {
    let mut generator = ChaCha8Rng::seed_from_u64(0);
    let counts: Vec<Vec<u32>> = (0..load.layers())
        .map(|layer| {
            let tokens: Vec<u64> = load.totals(layer).collect();
            let mut source = || records::draw(&tokens, 512, &mut generator).into_iter().map(|n| n as u32);
            (0..32).flat_map(|_| source().collect::<Vec<_>>()).collect()
        })
        .collect();
    let totals: Vec<Vec<u64>> = counts
        .iter()
        .map(|counts| {
            (0..256).map(|e| counts.iter().skip(e).step_by(256).map(|n| u64::from(*n)).sum()).collect()
        })
        .collect();
    println!(
        "split, 32 ranks 320 slots, us per layer: quotas of 32 sources; slots alone; balance of the batch"
    );
    let names: [(&str, Box<dyn PlacementPolicy>); 2] =
        [("EPLB", Box::new(Eplb::GLOBAL)), ("moeyard", Box::new(Moeyard::default()))];
    for (name, policy) in names {
        let placement = plan(load, policy.as_ref(), 32, 320);
        for split in [Split::Even, Split::WaterFill, Split::Exact, Split::ACTIVATED] {
            let mut quotas = SplitPlan::new(split);
            let all = time(50, || {
                (0..58).for_each(|layer| quotas.rebuild(placement.layer(layer), &counts[layer]));
            });
            let mut shares = Shares::default();
            let slots = time(50, || {
                (0..58).map(|l| shares.share(split, placement.layer(l), &totals[l]).unwrap()[0]).sum::<u64>()
            });
            let reached: Vec<f64> =
                (0..58).map(|l| records::reached(&mut shares, split, &placement, l, &totals[l])).collect();
            println!(
                "  {name:<8}{:<10} {:>6.1} {:>6.1}   {:>6.1} {:>6.1}   {:.4}",
                split.name(),
                all.0 * 1e3 / 58.0,
                all.1 * 1e3 / 58.0,
                slots.0 * 1e3 / 58.0,
                slots.1 * 1e3 / 58.0,
                mean(&reached)
            );
        }
    }
}

/// Each expert's load times exp(0.25 N(0,1)), seeds 0 to 9.
fn drifted(load: &LoadWindow) {
    let loads: Vec<LoadWindow> = (0..10).map(|seed| records::drifted(load, seed)).collect();
    let cluster = ClusterShape { ranks: 32, redundant: 32 };
    let stale = plan(load, &Moeyard::default(), 32, 288);
    let even = |placement: &Placement, load: &LoadWindow| mean(&even_balancedness(load, placement));
    println!(
        "drift, 32 ranks 288 slots, even split: stale {:.4}",
        mean(&loads.iter().map(|l| even(&stale, l)).collect::<Vec<_>>())
    );
    for limit in [4, 8, 16, 32] {
        let policy = Moeyard { max_transfers: Some(limit), ..Moeyard::default() };
        let start = Instant::now();
        let repaired: Vec<Placement> = loads
            .iter()
            .map(|l| policy.replan(std::slice::from_ref(l), Some(&stale), &cluster).unwrap())
            .collect();
        let ms = start.elapsed().as_secs_f64() * 1e3 / 10.0;
        let reached: Vec<f64> = repaired.iter().zip(&loads).map(|(p, l)| even(p, l)).collect();
        let moved: usize = repaired.iter().map(|p| transfers(&stale, p).len()).sum();
        println!(
            "  at most {limit:>2} transfers per layer: mean {:.4}, worst seed {:.4}, {:.1} transfers, {ms:.0} ms",
            mean(&reached),
            reached.iter().copied().fold(1.0, f64::min),
            moved as f64 / 580.0
        );
    }
    println!("drift, no transfer, batches of 64 tokens per rank: even, exact split");
    for (ranks, slots) in [(32, 288), (32, 320), (32, 384), (64, 320)] {
        for (name, policy) in
            [("EPLB", &Eplb::GLOBAL as &dyn PlacementPolicy), ("moeyard", &Moeyard::default())]
        {
            let placement = plan(load, policy, ranks, slots);
            let reached = |split| {
                let of = |(seed, load)| records::reached_by_batches(load, &placement, split, seed);
                mean(&(0..).zip(&loads).map(of).collect::<Vec<f64>>())
            };
            println!(
                "  {ranks} ranks {slots} slots {name:<8} {:.4} {:.4}",
                reached(Split::Even),
                reached(Split::Exact)
            );
        }
    }
}

/// Planned on MMLU, batches of 64 tokens of another dataset.
fn other_dataset(folder: &std::path::Path) {
    let load = records::gpt_oss_load(folder, "mmlu*");
    let batches = records::gpt_oss_batches(folder, "sorry_bench*", 64);
    println!("gpt-oss-20b, 8 ranks 40 slots, planned on mmlu, batches of sorry_bench: even, exact split");
    for (name, policy) in [("EPLB", &Eplb::GLOBAL as &dyn PlacementPolicy), ("moeyard", &Moeyard::default())]
    {
        let placement = plan(&load, policy, 8, 40);
        let mut shares = Shares::default();
        let mut reached = |split| {
            let batches = batches.iter().flat_map(|batch| batch.chunks(32).enumerate());
            let of = |(layer, tokens)| records::reached(&mut shares, split, &placement, layer, tokens);
            mean(&batches.map(of).collect::<Vec<f64>>())
        };
        println!("  {name:<8} {:.4} {:.4}", reached(Split::Even), reached(Split::Exact));
    }
}
