//! What a client notices of experts in several places. First what splitting a layer's rows among replicas costs each rank;
//! then the time between two tokens of a text while experts move all the time, against the same traffic while none
//! moves, in turns in one run.
//!
//! ```text
//! cargo bench --bench migration -- [MODEL_DIR] [--ranks 4] [--streams 8] [--rounds 6]
//! ```

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::Parser;
use moeyard::cli::launch::{Needs, Prepared};
use moeyard::cli::model::OpenModel;
use moeyard::config::RawOptions;
use moeyard::engine::rebalance::Mode;
use moeyard::engine::request::{Event, Request};
use moeyard::engine::stats::{RequestTiming, StepTiming, TimingObserver};
use moeyard::engine::{EngineHandle, RequestStream};
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Linear, Placement, PlacementPolicy};
use router_sim::split::{Split, SplitPlan};

#[derive(Parser)]
struct Arguments {
    /// Checkpoint folder [default: the embedded demo model]
    model: Option<PathBuf>,
    /// Expert-parallel ranks
    #[arg(long, default_value_t = 4)]
    ranks: usize,
    /// Texts that are generated side by side
    #[arg(long, default_value_t = 8)]
    streams: usize,
    /// Tokens of each text
    #[arg(long, default_value_t = 150)]
    tokens: usize,
    /// Batches of texts without and with moving experts
    #[arg(long, default_value_t = 6)]
    rounds: usize,
    /// As the server's flag
    #[arg(long, default_value_t = 1)]
    staging_slots: usize,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// Seconds between tokens, at rest and while experts move.
#[derive(Default)]
struct Gaps {
    moving: AtomicBool,
    seconds: [Mutex<Vec<f64>>; 2],
}

impl TimingObserver for Gaps {
    fn on_step(&self, _: &StepTiming) {}
    fn on_first_token(&self, _: Duration) {}
    fn on_next_token(&self, since_previous: Duration) {
        let moving = usize::from(self.moving.load(Ordering::Relaxed));
        self.seconds[moving].lock().unwrap().push(since_previous.as_secs_f64());
    }
    fn on_finish(&self, _: &RequestTiming) {}
}

impl Gaps {
    fn quantile(&self, moving: usize, q: f64) -> f64 {
        let mut seconds = self.seconds[moving].lock().unwrap().clone();
        seconds.sort_by(f64::total_cmp);
        seconds[((seconds.len() - 1) as f64 * q) as usize] * 1e3
    }
}

fn wait(mut stream: RequestStream) {
    while let Some(event) = stream.blocking_next() {
        if let Event::Finished(_) = event {
            return;
        }
    }
}

/// The experts of every layer one rank further: nearly all weights move.
fn further(placement: &Placement) -> Placement {
    let per_rank = placement.slots_per_rank();
    let layer = |layer: usize| {
        let mut map = placement.layer(layer).slots().to_vec();
        map.rotate_right(per_rank);
        map
    };
    let maps = (0..placement.layers()).map(layer).collect();
    let (ranks, experts) = (placement.ranks(), placement.experts());
    Placement::new(ranks, per_rank, experts, placement.layer_ids().to_vec(), maps).unwrap()
}

/// Experts and bytes that moved, and how long it took.
#[derive(Default)]
struct Moved {
    migrations: u64,
    experts: u64,
    bytes: u64,
    seconds: f64,
}

/// One batch of texts, while experts move or not.
fn round(
    engine: &EngineHandle,
    arguments: &Arguments,
    vocab: usize,
    number: usize,
    moved: Option<&mut Moved>,
) {
    let prompt =
        |i: usize| (0..24).map(|t| ((t * 7919 + i * 104_729 + number * 31) % vocab) as u32).collect();
    let streams: Vec<_> = (0..arguments.streams)
        .map(|i| engine.submit(Request::greedy(prompt(i), arguments.tokens)).unwrap())
        .collect();
    let texts = std::thread::spawn(move || streams.into_iter().for_each(wait));
    if let Some(moved) = moved {
        while !texts.is_finished() {
            let began = Instant::now();
            let target = further(&engine.placement().unwrap());
            let report = engine.move_to(target).unwrap().blocking_recv().unwrap();
            report.outcome.unwrap();
            moved.migrations += 1;
            moved.experts += report.progress.arrived;
            moved.bytes += report.progress.bytes;
            moved.seconds += began.elapsed().as_secs_f64();
        }
    }
    texts.join().unwrap();
}

/// Microseconds of one layer's split on every rank, for decode batches of 8 tokens per rank.
fn splits() {
    println!("{:>28} {:>9} {:>9} {:>9}", "us per layer", "even", "waterfill", "exact");
    for (ranks, experts, top_k, redundant) in
        [(4, 8, 2, 0), (4, 8, 2, 4), (4, 32, 4, 0), (4, 32, 4, 8), (32, 256, 8, 0), (32, 256, 8, 32)]
    {
        let shape = ClusterShape { ranks, redundant };
        let placement = Linear.place(&LoadWindow::new(&[0], experts), &shape).unwrap();
        let mut state = 1u32;
        let mut counts = vec![0u32; ranks * experts];
        for (row, count) in (0..ranks * 8 * top_k).enumerate() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // A few experts are hot.
            let draw = (state >> 16) as usize % (experts * 2);
            let expert = if draw < experts { draw } else { count % (experts / 4) };
            counts[row / (8 * top_k) * experts + expert] += 1;
        }
        let time = |split: Split| {
            let mut plan = SplitPlan::new(split);
            let mut best = f64::INFINITY;
            for _ in 0..20 {
                let began = Instant::now();
                (0..100).for_each(|_| plan.rebuild(placement.layer(0), std::hint::black_box(&counts)));
                best = best.min(began.elapsed().as_secs_f64() / 100.0);
            }
            best * 1e6
        };
        let [even, fill, exact] = [Split::Even, Split::WaterFill, Split::Exact].map(time);
        let what = format!("{ranks} ranks, {experts} + {redundant} slots");
        println!("{what:>28} {even:>9.2} {fill:>9.2} {exact:>9.2}");
    }
}

fn main() {
    let arguments = Arguments::parse();
    splits();
    let model = OpenModel::open(arguments.model.as_deref()).unwrap();
    let vocab = model.family.spec.vocab_size;
    let raw = RawOptions {
        expert_parallel_size: Some(arguments.ranks),
        staging_slots: Some(arguments.staging_slots),
        max_model_len: Some(256),
        rebalance: Some(Mode::Off),
        ..RawOptions::default()
    };
    let prepared = Prepared::new(model, raw, Needs::default()).unwrap();
    let gaps = Arc::new(Gaps::default());
    let launched = prepared.launch(Needs::default(), Some(Arc::clone(&gaps) as _)).unwrap();
    let engine = &launched.engine;
    let mut moved = Moved::default();
    // Warm up both ways.
    round(engine, &arguments, vocab, 1000, None);
    round(engine, &arguments, vocab, 1001, Some(&mut Moved::default()));
    gaps.seconds.iter().for_each(|seconds| seconds.lock().unwrap().clear());
    for number in 0..arguments.rounds {
        round(engine, &arguments, vocab, 2 * number, None);
        gaps.moving.store(true, Ordering::Relaxed);
        round(engine, &arguments, vocab, 2 * number + 1, Some(&mut moved));
        gaps.moving.store(false, Ordering::Relaxed);
    }
    println!(
        "{} ranks, {} texts at once, expert of {} bytes",
        arguments.ranks, arguments.streams, prepared.footprint.expert
    );
    println!("{:>10} {:>10} {:>10} {:>8}", "ms", "at rest", "moving", "ratio");
    for (name, q) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)] {
        let (rest, moving) = (gaps.quantile(0, q), gaps.quantile(1, q));
        println!("{name:>10} {rest:>10.3} {moving:>10.3} {:>8.3}", moving / rest);
    }
    println!(
        "{} migrations, {} experts, {:.1} MB/s over all ranks",
        moved.migrations,
        moved.experts,
        moved.bytes as f64 / moved.seconds / 1e6
    );
    launched.finish(Duration::ZERO, Duration::MAX).unwrap();
}
