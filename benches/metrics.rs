//! Cost of the metrics: `cargo bench --bench metrics`. The page of a model of DeepSeek-V3's size on eight ranks, and what the
//! engine's thread spends on telling a step; the best and the median of many.

mod timing;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moeyard::engine::stats::{EngineStats, StepTiming, TimingObserver};
use moeyard::metrics::{ExpertDetail, LoadSnapshot, LoadSource};
use moeyard::server::{Info, Metrics, RankMemory, SeriesOptions, Sources};
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Linear, Placement, PlacementPolicy};
use timing::micros;

const RANKS: usize = 8;
const EXPERTS: usize = 256;
/// Sequences that a step continues.
const BATCH: usize = 64;

fn layers() -> Vec<usize> {
    (3..61).collect()
}

/// A load as it is after hours.
struct Busy;

impl LoadSource for Busy {
    fn snapshot(&self) -> LoadSnapshot {
        LoadSnapshot::zeros(layers(), EXPERTS, RANKS)
    }

    fn step_imbalance(&self) -> f64 {
        0.37
    }

    fn placement(&self) -> Arc<Placement> {
        let shape = ClusterShape { ranks: RANKS, redundant: 0 };
        Arc::new(Linear.place(&LoadWindow::new(&layers(), EXPERTS), &shape).expect("256 experts on 8 ranks"))
    }
}

fn metrics(expert_detail: Option<ExpertDetail>) -> Metrics {
    let ranks = (0..RANKS).map(|_| Arc::default()).collect();
    let sources = Sources { load: Some(Arc::new(Busy)), ranks, ..Sources::default() };
    let info = Info { memory: vec![RankMemory::default(); RANKS], ..Info::default() };
    Metrics::new(&info, sources, SeriesOptions { expert_detail, max_series: 20_000 }).expect("metrics")
}

fn main() {
    println!(
        "{} layers of {EXPERTS} experts on {RANKS} ranks; microseconds, best and median",
        layers().len()
    );
    for (name, detail) in [("page, default detail", None), ("page, every expert", Some(ExpertDetail::Expert))]
    {
        let metrics = metrics(detail);
        let page = metrics.render(&EngineStats::default());
        let series = page.lines().filter(|line| !line.starts_with('#')).count();
        let (best, median) = micros(|| drop(black_box(metrics.render(&EngineStats::default()))));
        println!("{name} ({series} series, {} KiB): {best:.0} {median:.0}", page.len() / 1024);
    }
    let metrics = metrics(None);
    let step = StepTiming { duration: Duration::from_millis(7), prefill_rows: 0, decode_rows: BATCH };
    let (mut steps, mut upkeep) = (0, Duration::ZERO);
    let (best, median) = micros(|| {
        metrics.on_step(&step);
        (0..BATCH).for_each(|_| metrics.on_next_token(step.duration));
        steps += 1;
        // What a second's ticker does, in its share of steps.
        if steps % 128 == 0 {
            let start = Instant::now();
            metrics.run_upkeep();
            upkeep += start.elapsed();
        }
    });
    let upkeep = upkeep.as_secs_f64() * 1e6 / f64::from(steps / 128).max(1.0);
    println!(
        "a step of {BATCH} tokens: {best:.2} {median:.2}; the ticker's upkeep after 128 of them: {upkeep:.0}"
    );
}
