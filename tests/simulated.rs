//! Served = simulated: what router-sim makes of a recorded trace is what the engine did for the same tokens and placement,
//! row for row, and what its rebalancer decided.

mod support;

use std::path::Path;

use moeyard::Error;
use moeyard::config::RawOptions;
use moeyard::config::flags::DtypeChoice;
use moeyard::engine::rebalance::Mode;
use moeyard::engine::request::Request;
use router_sim::cost::{Constants, CostModel, ModelShape};
use router_sim::formats::{self, Options};
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, EMPTY, Eplb, Placement, PlacementPolicy, PolicyName};
use router_sim::report::data::Run;
use router_sim::simulate::{Agreement, LayerTally, OwnedRows, ServedRun, Setup, Simulator, Sources};
use router_sim::split::{Split, SplitPlan};
use router_sim::stream::TokenBatch;
use router_sim::topology::Cluster;
use support::launch::{Answer, Launch, greedy, options};
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

/// An engine that records.
fn launch(model: &str, raw: RawOptions, trace: &Path) -> Launch {
    let raw = RawOptions {
        expert_parallel_size: Some(RANKS),
        prefill_chunk_size: Some(16),
        record_routing: Some(trace.into()),
        ..raw
    };
    Launch::of(model, raw)
}

/// Serves with a placement, recording; returns what the engine counted and the placement it served with.
fn serve(model: &str, raw: RawOptions, trace: &Path) -> (Rows, Placement) {
    let engine = launch(model, raw, trace);
    engine.run(requests());
    counted(engine)
}

/// Ends an engine; returns what it counted and the placement it began with.
fn counted(engine: Launch) -> (Rows, Placement) {
    let prepared = engine.finish();
    let counters = prepared.load().counters;
    let layers = prepared.placement.layers();
    let rows = Rows {
        slots: (0..layers).map(|l| counters.iter().flat_map(|rank| rank.slot_rows(l)).collect()).collect(),
        between: (0..layers).map(|l| counters.iter().map(|rank| rank.sent_rows(l)).collect()).collect(),
    };
    (rows, (*prepared.placement).clone())
}

/// What the simulator makes of a trace.
struct Simulated {
    rows: Rows,
    report: Run,
    load: LoadWindow,
    agreement: Agreement,
}

/// Simulates what a trace holds, its switches of placement included.
fn simulate(model: &str, trace: &Path, placement: &Placement) -> Simulated {
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
    run.follow(ServedRun::read(trace).unwrap());
    let mut rows = Rows {
        slots: vec![vec![0; placement.slots()]; layers],
        between: vec![vec![vec![0; RANKS]; RANKS]; layers],
    };
    let mut load = tokens.shape().empty_window();
    let (mut tally, mut split, mut batch) =
        (LayerTally::default(), SplitPlan::new(Split::Exact), TokenBatch::default());
    let mut next_step = 0;
    while tokens.next_batch(&mut batch).unwrap() {
        run.step(&batch).unwrap();
        next_step = batch.step + 1;
        let placement = run.placement();
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
    let agreement = run.agreement(next_step).unwrap().expect("a run is followed");
    let report = run.finish(&load, placement);
    Simulated { rows, report, load, agreement }
}

/// Serves, simulates, compares; returns the load that was seen.
fn check(model: &str, raw: RawOptions) -> LoadWindow {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("run.moeroute");
    let (served, placement) = serve(model, raw, &trace);
    let Simulated { rows: simulated, report, load, agreement } = simulate(model, &trace, &placement);
    assert_eq!(agreement, Agreement::default(), "{model}: nothing was decided");
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

/// Serves traffic on one topic after the other, with answers as without rebalancing, then replays the trace. With `every`,
/// until experts have moved for both topics; whether a move pays for auto is for the machine's clock to say.
fn check_rebalanced(model: &str, rebalance: Mode, redundant: usize) {
    // A topic is a few tokens, over and over: its experts are hot.
    let topic = |first: u32| -> Vec<Request> {
        let prompt = |i: u32| (0..20 + i).map(|t| first + (t * 7 + i) % 5).collect::<Vec<_>>();
        (0..6).map(|i| greedy(&prompt(i), 24)).collect()
    };
    let topics = [topic(300), topic(3000)];
    let quiet =
        Launch::of(model, RawOptions { expert_parallel_size: Some(RANKS), ..options(DtypeChoice::F32) });
    let expected = topics.clone().map(|topic| quiet.run(topic).iter().map(Answer::bits).collect::<Vec<_>>());
    quiet.finish();

    let folder = tempfile::tempdir().unwrap();
    let (trace, saved) = (folder.path().join("run.moeroute"), folder.path().join("placement.json"));
    let raw = RawOptions {
        rebalance: Some(rebalance),
        rebalance_window: Some(16),
        redundant_experts: Some(redundant),
        save_placement: Some(saved.clone()),
        ..options(DtypeChoice::F32)
    };
    let engine = launch(model, raw.clone(), &trace);
    for (topic, expected) in topics.iter().zip(&expected) {
        let before = engine.engine().rebalance_status().applied;
        let mut rounds = 0;
        let moved = || engine.engine().rebalance_status().applied > before;
        while if rebalance == Mode::Auto { rounds < 2 } else { !moved() } {
            let answers = engine.run(topic.clone());
            assert_eq!(
                &answers.iter().map(Answer::bits).collect::<Vec<_>>(),
                expected,
                "{model}: other bits"
            );
            rounds += 1;
            assert!(rounds < 200, "{model}: no expert moves: {:?}", engine.engine().rebalance_status());
        }
    }
    // An operator wants the beginning back, as soon as nobody else moves experts.
    let order = loop {
        match engine.engine().move_to(Placement::clone(&engine.prepared.placement)) {
            Ok(order) => break order,
            Err(Error::Conflict(_)) => drop(engine.run(topics[0].clone())),
            Err(error) => panic!("{model}: {error}"),
        }
    };
    assert_eq!(order.blocking_recv().unwrap().outcome, Ok(()));
    engine.run(topics[0].clone());
    let status = engine.engine().rebalance_status();
    assert!(status.failed == 0 && status.last.is_some() && status.since_look.is_some(), "{status:?}");
    assert!(rebalance == Mode::Auto || status.moved_experts > 0 && status.moved_bytes > 0, "{status:?}");
    let last_placement = engine.engine().placement().unwrap();
    let (served, first_placement) = counted(engine);
    let Simulated { rows, agreement, .. } = simulate(model, &trace, &first_placement);
    assert_eq!(agreement.differences, [""; 0], "{model}: {agreement:?}");
    assert!(agreement.decisions >= 2 && agreement.operators == 1, "{agreement:?}");
    assert_eq!(agreement.migrations + status.skipped, agreement.decisions, "{agreement:?}");
    assert_eq!(served, rows, "{model}: rows per slot over {} switches", agreement.switches);

    // What was saved is what was in force, and the next start takes it.
    let warm = Launch::of(
        model,
        RawOptions {
            expert_parallel_size: Some(RANKS),
            placement: Some(saved),
            save_placement: None,
            redundant_experts: None,
            ..raw
        },
    );
    let placement = warm.engine().placement().unwrap();
    assert!((0..placement.layers()).all(|l| placement.layer(l).slots() == last_placement.layer(l).slots()));
    warm.finish();
}

#[test]
fn rebalanced_mixtral_is_served_as_simulated() {
    check_rebalanced("demo-mixtral", Mode::Every(8), 4);
}

#[test]
fn rebalanced_deepseek_is_served_as_simulated() {
    check_rebalanced("demo-deepseek", Mode::Every(8), 8);
}

#[test]
fn what_auto_decides_is_decided_again() {
    check_rebalanced("demo-deepseek", Mode::Auto, 8);
}
