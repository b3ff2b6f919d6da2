//! What it costs to know the load: counting a step and recording its trace, as each rank does while it serves; reading all
//! counters, as the rebalancer does where a part of its window ends, and looking at them.

mod timing;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moeyard::metrics::LoadSource;
use moeyard::moe::in_force::InForce;
use moeyard::moe::load::{LoadCounters, WorldLoad};
use router_sim::load::{LoadWindow, Phase};
use router_sim::placement::{ClusterShape, Linear, Placement, PlacementPolicy, PolicyName};
use router_sim::rebalance::{Inputs, Mode, Rebalancer, Rebalancing};
use router_sim::split::Split;
use router_sim::trace::{Degrees, Piece, RowInfo, StepInfo, TraceHeader, TraceWriter, WeightFormat};
use timing::micros;

/// Steps recorded.
const STEPS: u64 = 5_000;

fn main() {
    println!("layers x experts, top-k, rows of a step: count it; record it (microseconds, best, median)");
    // The shapes of `make_checkpoint`, and DeepSeek-V3.
    for (layers, experts, top_k, rows) in [(16, 8, 2, 16), (11, 64, 6, 16), (10, 64, 8, 16), (58, 256, 8, 64)]
    {
        let step = Step::new(layers, experts, top_k, rows);
        let (count, record) = (step.count(), step.record());
        println!("{layers} x {experts}, top {top_k}, {rows} rows: {count:.1?} us; {record:.1?} us");
    }
    println!("layers x experts on ranks: read all counters; decide one look (best, median)");
    for (layers, experts, ranks, redundant) in [(6, 8, 4, 4), (4, 32, 4, 8), (58, 256, 32, 32)] {
        let cluster = ClusterShape { ranks, redundant };
        let load = skewed(layers, experts);
        let placement = Arc::new(Linear.place(&load, &cluster).expect("the slots hold all experts"));
        let world = WorldLoad {
            in_force: Arc::new(InForce::new(Arc::clone(&placement))),
            counters: (0..ranks).map(|_| Arc::new(LoadCounters::new(&placement))).collect(),
        };
        let read = micros(|| drop(std::hint::black_box(world.snapshot())));
        let settings = Rebalancing::of_mode(Mode::Auto, 256, PolicyName::BEST).expect("auto has settings");
        let inputs =
            Inputs { row_us: [1.0, 5.0], expert_bytes: 44e6, migration_bytes_per_us: 5e3, switch_us: 50.0 };
        let none = LoadWindow::new(load.layer_ids(), experts);
        let decide = micros(|| {
            let mut rebalancer =
                Rebalancer::new(settings, PolicyName::BEST, cluster, Split::Exact, none.clone());
            for _ in 0..64 {
                std::hint::black_box(rebalancer.after_step());
            }
            let verdict = rebalancer.look(64, &load, inputs, &placement).decide().expect("a verdict");
            assert!(verdict.target.is_some(), "{}", verdict.reason);
        });
        println!("{layers} x {experts} on {ranks}: {read:.1?} us; {decide:.1?} us");
    }
}

/// A load in which some experts are far hotter than others.
fn skewed(layers: usize, experts: usize) -> LoadWindow {
    let ids: Vec<usize> = (0..layers).collect();
    let mut load = LoadWindow::new(&ids, experts);
    for layer in 0..layers {
        for (expert, n) in load.counts_mut(Phase::Decode, layer).iter_mut().enumerate() {
            *n = 100_000 / (1 + (expert * 7 + layer) as u64 % experts as u64);
        }
    }
    load
}

/// A decode step of one rank that owns all experts.
struct Step {
    top_k: usize,
    rows: usize,
    /// `[layers][rows][top_k]`
    ids: Vec<u32>,
    placement: Placement,
}

impl Step {
    fn new(layers: usize, experts: usize, top_k: usize, rows: usize) -> Step {
        let cluster = ClusterShape { ranks: 1, redundant: 0 };
        let placement = Linear.place(&skewed(layers, experts), &cluster).expect("a slot for each expert");
        // Distinct in a row, other ones in each row and layer.
        let id = |i: usize| (i / top_k * 5 + i % top_k * 3) as u32 % experts as u32;
        Step { top_k, rows, ids: (0..layers * rows * top_k).map(id).collect(), placement }
    }

    /// As the MoE layer counts: every assignment, and the rows of every slot.
    fn count(&self) -> (f64, f64) {
        let counters = LoadCounters::new(&self.placement);
        let mut offsets = vec![0; self.placement.slots_per_rank() + 1];
        micros(|| {
            for (layer, ids) in self.ids.chunks(self.rows * self.top_k).enumerate() {
                offsets.fill(0);
                for &expert in ids {
                    counters.count(Phase::Decode, layer, expert as usize, 0);
                    offsets[expert as usize + 1] += 1;
                }
                (1..offsets.len()).for_each(|slot| offsets[slot] += offsets[slot - 1]);
                counters.set_computed(layer, &offsets);
            }
        })
    }

    /// What the rank's thread spends on the record; another thread writes it.
    fn record(&self) -> (f64, f64) {
        let folder = tempfile::tempdir().expect("a folder for the trace");
        let mut writer = self.writer(&folder.path().join("trace"));
        let row = |request: u64| RowInfo { request, position: 300, phase: Phase::Decode, recomputed: false };
        let rows: Vec<RowInfo> = (0..self.rows as u64).map(row).collect();
        let counters = writer.counters();
        let mut taken: Vec<f64> = (0..STEPS)
            .map(|step| {
                let info = StepInfo {
                    step,
                    start_us: step * 20_000,
                    duration_us: 20_000,
                    placement_version: 0,
                    rows: self.rows as u64,
                };
                let start = Instant::now();
                writer.step(&info, &[Piece { rank: 0, rows: &rows, ids: &self.ids, weights: &[] }]);
                let taken = start.elapsed().as_secs_f64() * 1e6;
                // Steps take longer than the disk; without a pause the queue would be full, and losing a record costs nothing.
                while counters.written_records() <= step {
                    std::thread::yield_now();
                }
                taken
            })
            .collect();
        writer.finish(Duration::from_secs(60)).expect("the trace is written");
        taken.sort_by(f64::total_cmp);
        (taken[0], taken[taken.len() / 2])
    }

    fn writer(&self, path: &Path) -> TraceWriter {
        let header = TraceHeader {
            spec_digest: String::new(),
            family: "bench".into(),
            top_k: self.top_k,
            degrees: Degrees { tensor: 1, data: 1, expert: 1, pipeline: 1 },
            node_of_rank: vec![0],
            policy: Default::default(),
            cost: Default::default(),
            weights: WeightFormat::None,
            placement: self.placement.clone(),
        };
        TraceWriter::create(path, header).expect("a trace")
    }
}
