//! Speed of `experts` over rows per expert, beside the limits of the machine measured in the same run:
//! `cargo bench --bench kernels [-- THREADS]`. Every line is the best of several runs over experts that together are far larger than
//! the caches; `of limit` is the larger of bandwidth / read bandwidth and arithmetic / peak.

use std::time::{Duration, Instant};

use moeyard::backend::cpu::{CpuBackend, limits};
use moeyard::backend::{Backend, DType, ExpertsArgs, HostData, HostMatrix, HostMlp, Mlp};
use moeyard::spec::Activation;

const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 2064;
/// About 0.4 GB of bf16.
const EXPERTS: usize = 16;
/// Products (rows x experts) per call; more rows visit fewer experts.
const MOST_ROWS: usize = 1024;
/// Calls are repeated at least so often and for so long; the best counts.
const ROUNDS: usize = 5;
const PATIENCE: Duration = Duration::from_millis(600);
const READ_BYTES: usize = 1 << 28;

fn matrix(n: usize, k: usize) -> HostMatrix<'static> {
    let data = (0..n * k).map(|i| ((i * 2_654_435_761) % 1021) as f32 / 51_000.0 - 0.01);
    HostMatrix { n, k, data: HostData::F32(data.collect()) }
}

fn experts(backend: &CpuBackend, dtype: DType) -> moeyard::Result<Vec<Option<Mlp>>> {
    let host = HostMlp {
        gate: matrix(INTERMEDIATE, HIDDEN),
        up: matrix(INTERMEDIATE, HIDDEN),
        down: matrix(HIDDEN, INTERMEDIATE),
        bias: None,
    };
    (0..EXPERTS).map(|_| backend.pack_mlp(&host, dtype).map(Some)).collect()
}

/// Seconds of the fastest call with `rows` rows for each of the first `used` experts.
fn seconds(
    backend: &CpuBackend,
    slots: &[Option<Mlp>],
    dtype: DType,
    rows: usize,
    used: usize,
) -> moeyard::Result<f64> {
    let offsets: Vec<usize> = (0..=slots.len()).map(|slot| slot.min(used) * rows).collect();
    let x = backend.alloc(dtype, rows * used, HIDDEN)?;
    let mut out = backend.alloc(dtype, rows * used, HIDDEN)?;
    let mut best = Duration::MAX;
    let begin = Instant::now();
    let mut round = 0;
    while round < ROUNDS || begin.elapsed() < PATIENCE {
        round += 1;
        let args = ExpertsArgs { rows: x.view(), offsets: &offsets, slots, activation: Activation::SiluMul };
        let start = Instant::now();
        backend.experts(args, out.view_mut())?;
        best = best.min(start.elapsed());
    }
    Ok(best.as_secs_f64())
}

fn best(speeds: &[f64]) -> f64 {
    speeds.iter().copied().fold(f64::NAN, f64::max)
}

fn main() -> moeyard::Result<()> {
    // `cargo bench` itself passes `--bench`.
    let threads = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(2);
    let backend = CpuBackend::detect(threads)?;
    println!("{}; {EXPERTS} experts of {HIDDEN} x {INTERMEDIATE}", backend.describe());
    println!("type   rows      GFLOP/s     peak    GB/s    read  of limit");
    for dtype in [DType::Bf16, DType::F32] {
        let slots = experts(&backend, dtype)?;
        for rows in (0..10).map(|power| 1 << power) {
            let peak = match dtype {
                DType::Bf16 => best(&limits::bf16_gflops(&backend)),
                _ => best(&limits::f32_gflops(&backend)),
            };
            let read = best(&limits::read_gbytes(&backend, READ_BYTES)?);
            let used = (MOST_ROWS / rows).clamp(1, EXPERTS);
            let seconds = seconds(&backend, &slots, dtype, rows, used)?;
            let weights = 3 * HIDDEN * INTERMEDIATE * used;
            let gflops = (2 * weights * rows) as f64 / seconds / 1e9;
            let gbytes = (weights * dtype.bytes()) as f64 / seconds / 1e9;
            let ratio = (gflops / peak).max(gbytes / read);
            println!(
                "{:5} {rows:5} {gflops:12.1} {peak:8.1} {gbytes:7.1} {read:7.1} {:7.0} %",
                format!("{dtype:?}"),
                ratio * 100.0
            );
        }
    }
    Ok(())
}
