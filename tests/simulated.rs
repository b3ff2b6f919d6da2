//! Served = simulated: what router-sim makes of a recorded trace is what the engine did for the same tokens and placement,
//! row for row.

mod support;

use std::path::Path;

use moeyard::config::RawOptions;
use moeyard::config::flags::DtypeChoice;
use moeyard::engine::request::Request;
use router_sim::cost::{Constants, CostModel, ModelShape};
use router_sim::formats::{self, Options};
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, EMPTY, Eplb, Placement, PlacementPolicy, PolicyName};
use router_sim::report::data::Run;
use router_sim::simulate::{LayerTally, OwnedRows, Setup, Simulator, Sources};
use router_sim::split::{Split, SplitPlan};
use router_sim::stream::TokenBatch;
use router_sim::topology::Cluster;
use support::launch::{Launch, greedy, options};
use support::model_dir;

const RANKS: usize = 4;

/// Rows of every slot and between every pair of ranks, over a whole run.
#[derive(Debug, PartialEq, Eq)]
struct Rows {
    /// `[layers][slots]`
    slots: Vec<Vec<u64>>,
    /// `[layers][sources][destinations]`
    between: Vec<Vec<Vec<u64>>>,
}

/// Prompts of several lengths, so that ranks own unequally many rows and decode goes on beside prefill.
fn requests() -> Vec<Request> {
    let prompt = |i: u32| (0..5 + 9 * i).map(|t| (t * 37 + i * 101) % 4000).collect::<Vec<_>>();
    (0..7).map(|i| greedy(&prompt(i), 10 + 2 * i as usize)).collect()
}

/// Serves with a placement, recording; returns what the engine counted and the placement it served with.
fn serve(model: &str, raw: RawOptions, trace: &Path) -> (Rows, Placement) {
    let raw = RawOptions {
        expert_parallel_size: Some(RANKS),
        prefill_chunk_size: Some(16),
        record_routing: Some(trace.into()),
        ..raw
    };
    let engine = Launch::of(model, raw);
    engine.run(requests());
    let prepared = engine.finish();
    let counters = prepared.load().counters;
    let layers = prepared.placement.layers();
    let rows = Rows {
        slots: (0..layers).map(|l| counters.iter().flat_map(|rank| rank.slot_rows(l)).collect()).collect(),
        between: (0..layers).map(|l| counters.iter().map(|rank| rank.sent_rows(l)).collect()).collect(),
    };
    (rows, (*prepared.placement).clone())
}

/// What the simulator makes of the trace: every slot's rows, and its report.
fn simulate(model: &str, trace: &Path, placement: &Placement) -> (Rows, Run, LoadWindow) {
    let cluster = Cluster::find("cpu-2-sockets").unwrap().with_nodes(1).unwrap();
    let cluster = Cluster { devices_per_node: RANKS, ..cluster };
    let config = model_dir(model).join("config.json");
    let shape = ModelShape::find(config.to_str().unwrap()).unwrap();
    let cost = CostModel::new(&cluster, RANKS, &shape, &Constants::default()).unwrap();
    let setup = Setup {
        name: model.to_owned(),
        policy: PolicyName::Linear,
        split: Split::Exact,
        redundant: placement.slots() - placement.experts(),
        rebalancing: None,
        sources: Sources::Recorded,
        threads: 1,
    };
    let mut tokens = formats::open_tokens(trace, &Options::default()).unwrap();
    let (layers, top_k) = (tokens.shape().layers(), tokens.shape().top_k);
    let mut run = Simulator::new(&setup, &cluster, &cost, tokens.shape(), placement.clone()).unwrap();
    let mut rows = Rows {
        slots: vec![vec![0; placement.slots()]; layers],
        between: vec![vec![vec![0; RANKS]; RANKS]; layers],
    };
    let mut load = tokens.shape().empty_window();
    let (mut tally, mut split, mut batch) =
        (LayerTally::default(), SplitPlan::new(Split::Exact), TokenBatch::default());
    while tokens.next_batch(&mut batch).unwrap() {
        run.step(&batch).unwrap();
        batch.add_to(&mut load);
        let first = |rank: usize| batch.rows.partition_point(|row| (row.rank as usize) < rank);
        let starts: Vec<usize> = (0..=RANKS).map(first).collect();
        let owned = OwnedRows { starts: &starts, top_k, ranks_per_node: RANKS };
        for layer in 0..layers {
            tally.count(placement.layer(layer), &mut split, owned, batch.layer(layer, layers));
            for (sum, &n) in rows.slots[layer].iter_mut().zip(&tally.slot_rows) {
                *sum += u64::from(n);
            }
            for (sum, &n) in rows.between[layer].iter_mut().flatten().zip(&tally.rows) {
                *sum += u64::from(n);
            }
        }
    }
    let report = run.finish(&load, placement);
    (rows, report, load)
}

/// Serves, simulates, compares; returns the load that was seen.
fn check(model: &str, raw: RawOptions) -> LoadWindow {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("run.moeroute");
    let (served, placement) = serve(model, raw, &trace);
    let (simulated, report, load) = simulate(model, &trace, &placement);
    assert!(served.slots.iter().flatten().sum::<u64>() > 1000, "{model}: hardly anything was served");
    assert_eq!(served, simulated, "{model}, {} slots", placement.slots());

    let per_rank = |slots: &Vec<u64>| -> Vec<u64> {
        slots.chunks(placement.slots_per_rank()).map(|slots| slots.iter().sum()).collect()
    };
    assert_eq!(report.rank_tokens, served.slots.iter().map(per_rank).collect::<Vec<_>>());
    let all: u64 = served.between.iter().flatten().flatten().sum();
    let home: u64 = served.between.iter().flat_map(|layer| (0..RANKS).map(|rank| layer[rank][rank])).sum();
    assert_eq!((report.traffic.rows, report.traffic.local_rows), (all, home));
    load
}

/// A placement that a policy made, with what none would do: two copies of an expert on one rank, and an empty slot.
fn odd(placement: &Placement) -> Placement {
    let per_rank = placement.slots_per_rank() + 2;
    let layer = |layer: usize| {
        (0..RANKS)
            .flat_map(|rank| {
                let held = placement.layer(layer).slots_of_rank(rank);
                [held[0], EMPTY].into_iter().chain(held.iter().rev().copied()).collect::<Vec<_>>()
            })
            .collect()
    };
    let slots = (0..placement.layers()).map(layer).collect();
    Placement::new(RANKS, per_rank, placement.experts(), placement.layer_ids().to_vec(), slots).unwrap()
}

fn check_model(model: &str) {
    let raw = options(DtypeChoice::F32);
    let load = check(model, raw.clone());
    check(model, RawOptions { redundant_experts: Some(5), ..raw.clone() });
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("placement.json");
    let balanced = Eplb::GLOBAL.place(&load, &ClusterShape { ranks: RANKS, redundant: 8 }).unwrap();
    for placement in [odd(&balanced), balanced] {
        placement.write(&file).unwrap();
        let again = check(model, RawOptions { placement: Some(file.clone()), ..raw.clone() });
        assert_eq!(again, load, "{model}: another placement, the same choices");
    }
}

#[test]
fn demo_mixtral_is_served_as_simulated() {
    check_model("demo-mixtral");
}

#[test]
fn demo_deepseek_is_served_as_simulated() {
    check_model("demo-deepseek");
}
