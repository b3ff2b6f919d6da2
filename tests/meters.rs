//! What the ranks say of their own work, against the routing that the same steps report: traffic to the byte, every
//! choice counted once, and no time that nobody answers for.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use moeyard::backend::DType;
use moeyard::metrics::{CommOp, LoadSource, Phase, RankMeter, Work};
use moeyard::model::world::Degrees;
use moeyard::moe::load::WorldLoad;
use support::{Setup, World, model_dir};

/// Bytes of a number that travels when the model runs in f32.
const F32: u64 = 4;

/// Loads the demo model and runs a prompt and some more tokens on data-parallel rank 0.
fn run(degrees: Degrees) -> (World, Vec<usize>, Duration) {
    let mut world = World::load(&model_dir("demo-mixtral"), &Setup { degrees, ..Setup::solo(DType::F32) });
    let prompt: Vec<u32> = (0..20).map(|i| 30 + i * 7).collect();
    let began = Instant::now();
    let mut sequence = world.sequence(&prompt);
    let mut rows = vec![prompt.len()];
    world.step(0, &mut [(&mut sequence, prompt.len())]);
    for token in [5, 6, 7] {
        sequence.tokens.push(token);
        world.step(0, &mut [(&mut sequence, 1)]);
        rows.push(1);
    }
    (world, rows, began.elapsed())
}

fn meters(world: &World) -> Vec<Arc<RankMeter>> {
    world.counters.iter().map(|counters| Arc::clone(&counters.meter)).collect()
}

/// Choices that rank `rank` of the world made for experts on `destination`, over all layers.
fn choices(world: &World, rank: usize, destination: usize) -> u64 {
    let own = WorldLoad { in_force: world.in_force(), counters: vec![Arc::clone(&world.counters[rank])] };
    let snapshot = own.snapshot();
    Phase::ALL.iter().map(|&phase| snapshot.rank_total(destination, phase)).sum()
}

#[test]
fn dispatched_and_combined_bytes_are_those_of_the_rows_that_left() {
    let (world, ..) = run(Degrees { data_parallel: 2, ..Degrees::SOLO });
    let row = world.family.spec.hidden_size as u64 * F32;
    let meters = meters(&world);
    let away = choices(&world, 0, 1);
    assert!(away > 0, "experts 4 to 7 are on rank 1");
    for (op, sender, receiver) in [(CommOp::Dispatch, 0, 1), (CommOp::Combine, 1, 0)] {
        assert_eq!(meters[sender].sent_bytes(op), away * row, "{op:?}");
        assert_eq!(meters[receiver].received_bytes(op), away * row, "{op:?}");
        assert_eq!((meters[receiver].sent_bytes(op), meters[sender].received_bytes(op)), (0, 0), "{op:?}");
    }
    for op in [CommOp::AllReduce, CommOp::Migrate] {
        assert!(meters.iter().all(|meter| meter.sent_bytes(op) == 0), "{op:?}");
    }
}

#[test]
fn tensor_parallel_bytes_are_two_collectives_per_attention() {
    let (world, steps, _) = run(Degrees { tensor_parallel: 2, ..Degrees::SOLO });
    let hidden = world.family.spec.hidden_size as u64;
    let layers = world.family.spec.layers.len() as u64;
    // Of n rows, rank 0 owns the larger half. Gathering sends the own rows, summing receives the other's parts of them.
    let own = |rank: u64| steps.iter().map(|&n| (n as u64 + 1 - rank) / 2).sum::<u64>();
    for (rank, meter) in meters(&world).iter().enumerate() {
        let (mine, theirs) = (own(rank as u64), own(1 - rank as u64));
        let bytes = layers * (mine + theirs) * hidden * F32;
        assert_eq!(meter.sent_bytes(CommOp::AllReduce), bytes, "rank {rank}");
        assert_eq!(meter.received_bytes(CommOp::AllReduce), bytes, "rank {rank}");
    }
}

#[test]
fn one_rank_sends_nothing_and_waits_for_nobody() {
    let (world, steps, passed) = run(Degrees::SOLO);
    let meter = &meters(&world)[0];
    assert!(CommOp::ALL.iter().all(|&op| meter.sent_bytes(op) + meter.received_bytes(op) == 0));
    for silent in [Work::Wait, Work::AllReduce, Work::Sample] {
        assert_eq!(meter.spent(silent), Duration::ZERO, "{silent:?}");
    }
    for busy in [Work::Attention, Work::Router, Work::Dispatch, Work::Expert, Work::Combine, Work::Dense] {
        assert!(meter.spent(busy) > Duration::ZERO, "{busy:?}");
    }
    // Laps leave no gap inside a step and take nothing from outside.
    let inside: Duration = Work::ALL.iter().map(|&work| meter.spent(work)).sum();
    assert!(inside <= passed, "{inside:?} of {passed:?}");

    let spec = &world.family.spec;
    let snapshot = world.load_snapshot();
    let rows: usize = steps.iter().sum();
    for layer in 0..spec.moe_layers().len() {
        let experts: u64 = snapshot.layer_experts(layer).iter().sum();
        assert_eq!(experts, (rows * spec.moe.top_k) as u64, "layer {layer}: tokens times top_k");
        assert_eq!(snapshot.layer_ranks(layer), [experts]);
    }
    assert_eq!(snapshot.rank_total(0, Phase::Decode), 3 * (spec.moe.top_k * spec.moe_layers().len()) as u64);
}

#[test]
fn ranks_that_wait_say_so() {
    let (world, ..) = run(Degrees { data_parallel: 2, ..Degrees::SOLO });
    // Rank 1 has no rows of its own and so meets rank 0 after every attention of it.
    let meters = meters(&world);
    assert!(meters[1].spent(Work::Wait) > Duration::ZERO);
    assert!(meters.iter().all(|meter| meter.is_up()));
    drop(world);
    assert!(!meters.iter().any(|meter| meter.is_up()));
}

#[test]
fn the_imbalance_of_a_step_is_that_of_the_rows_it_computed() {
    let mut world = World::load(&model_dir("demo-mixtral"), &Setup::expert_parallel(DType::F32, 2));
    let mut sequence = world.sequence(&[40, 50, 60, 70, 80]);
    world.step(0, &mut [(&mut sequence, 5)]);
    let load = WorldLoad { in_force: world.in_force(), counters: world.counters.clone() };
    let snapshot = load.snapshot();
    let (mut max, mut all) = (0, 0);
    for layer in 0..world.family.spec.moe_layers().len() {
        let ranks = snapshot.layer_ranks(layer);
        max += ranks.iter().max().unwrap();
        all += ranks.iter().sum::<u64>();
    }
    assert_eq!(load.step_imbalance(), (2 * max) as f64 / all as f64 - 1.0);
}
