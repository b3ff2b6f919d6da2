//! Exchanges of rows between ranks that share this GPU: by copies, and by NCCL where it can put several ranks on one. Neither shows
//! what a link between GPUs does; both show what a call costs the host and the stream.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moeyard::backend::cuda::CudaBackend;
use moeyard::backend::{Backend, DType};
use moeyard::comm::nccl::{Library, Options};
use moeyard::comm::{Communicator, Transport, connect};

use crate::threads::on_threads;

const HIDDEN: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(30);

/// Prints a table.
pub fn run() {
    println!("{:<56} {:>10} {:>10}", "exchange", "us", "GB/s");
    for (name, transport) in transports() {
        for ranks in [2, 4] {
            for rows in [8, 4096] {
                let [moved, summed] = measure(&transport, ranks, rows);
                line(
                    &format!("{name}, {ranks} ranks, all-to-all {rows} x {HIDDEN} bf16"),
                    moved,
                    rows * HIDDEN * 2,
                );
                line(&format!("{name}, {ranks} ranks, sum {rows} x {HIDDEN} f32"), summed, rows * HIDDEN * 4);
            }
        }
    }
}

fn transports() -> Vec<(&'static str, Transport)> {
    let mut found = vec![("local", Transport::Local)];
    let given = std::env::var_os("MOEYARD_NCCL_SO").map(PathBuf::from);
    let shares = std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some_and(|value| value == "1");
    match Library::load(given.as_deref()) {
        Ok(library) if shares && library.shares_gpus() => {
            println!("with {}", library.describe());
            let options =
                Options { connect_timeout: PATIENCE, timeout: PATIENCE, shared_gpu: true, loopback: false };
            found.push(("nccl", Transport::Nccl(Arc::new(library), options)));
        }
        Ok(library) => {
            println!("no figures of {}: it cannot share this GPU between ranks", library.describe())
        }
        Err(why) => println!("no figures of NCCL: {why}"),
    }
    found
}

fn line(name: &str, seconds: f64, bytes: usize) {
    println!("{name:<56} {:>10.1} {:>10.1}", seconds * 1e6, bytes as f64 / seconds / 1e9);
}

/// Seconds that one rank takes per all-to-all and per sum.
fn measure(transport: &Transport, ranks: usize, rows: usize) -> [f64; 2] {
    let backends: Vec<_> = (0..ranks).map(|_| CudaBackend::open(0).unwrap().into_dyn()).collect();
    let ends = connect(transport, &backends).unwrap();
    let times = on_threads(ends.into_iter().zip(&backends), |(mut end, backend)| {
        of_rank(backend.as_ref(), end.as_mut(), rows)
    });
    times[0]
}

fn of_rank(backend: &dyn Backend, end: &mut dyn Communicator, rows: usize) -> [f64; 2] {
    let counts = vec![rows / end.size(); end.size()];
    let sent = backend.alloc(DType::Bf16, rows, HIDDEN).unwrap();
    let mut received = backend.alloc(DType::Bf16, rows, HIDDEN).unwrap();
    let mut sum = backend.alloc(DType::F32, rows, HIDDEN).unwrap();
    let probe = backend.alloc(DType::F32, 1, 1).unwrap();
    let moved = time(backend, end, &probe, |end| {
        end.all_to_all_rows(sent.view(), &counts, received.view_mut(), &counts).unwrap();
    });
    let summed = time(backend, end, &probe, |end| end.all_reduce_sum(sum.view_mut()).unwrap());
    [moved, summed]
}

/// Seconds per call; every rank makes the same number of them.
fn time(
    backend: &dyn Backend,
    end: &mut dyn Communicator,
    probe: &moeyard::backend::Tensor,
    mut call: impl FnMut(&mut dyn Communicator),
) -> f64 {
    const CALLS: usize = 50;
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        end.barrier().unwrap();
        let start = Instant::now();
        for _ in 0..CALLS {
            call(end);
        }
        backend.download(probe.view(), &mut [0; 4]).unwrap();
        best = best.min(start.elapsed().as_secs_f64() / CALLS as f64);
    }
    best
}
