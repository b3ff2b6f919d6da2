//! How fast the CUDA backend's operations are against the limits of the card, through the same trait that the engine uses. Prints a
//! table; does nothing where there is no GPU.
//!
//! With the argument `products`, only products, by every kernel there is for them; with `loads`, experts of prompts whose loads differ; with
//! `sampling`, choosing tokens; with `exchanges`, exchanges between ranks; with `worlds`, layers of several ranks.
//!
//! Times are of a loop of calls with one wait at the end, so launch overhead counts where it is not hidden. Weights are random and
//! together larger than the second-level cache.

mod attention;
mod bench;
mod exchanges;
mod experts;
#[path = "../../tests/support/moe_rank.rs"]
mod moe_rank;
#[path = "../../tests/support/numbers.rs"]
mod numbers;
mod products;
mod sampling;
#[path = "../../tests/support/threads.rs"]
mod threads;
mod worlds;

use bench::{Bench, Limits};
use experts::{ExpertShape, SHAPES};
use moeyard::backend::cuda::{self, CudaBackend, ProductKernels};
use moeyard::backend::{DType, Mlp};
use numbers::Numbers;

fn main() {
    // `cargo test --benches` only asks whether it starts.
    if std::env::args().any(|a| a == "--test") {
        return;
    }
    match cuda::devices() {
        Ok(_) if std::env::args().any(|a| a == "exchanges") => exchanges::run(),
        Ok(_) if std::env::args().any(|a| a == "worlds") => worlds::run(),
        Ok(_) => {
            let open = |kernel| CudaBackend::open(0).unwrap().with_products(kernel).into_dyn();
            let gpu = CudaBackend::open(0).unwrap().into_dyn();
            let mut bench = Bench { gpu, others: Vec::new(), numbers: Numbers(7) };
            if std::env::args().any(|a| a == "products") {
                let kernels = [ProductKernels::Clusters { rows: 0 }, ProductKernels::Portable];
                bench.others = kernels.map(|kernels| (format!("{kernels:?}"), open(kernels))).into();
                kernels_of_products(bench);
            } else if std::env::args().any(|a| a == "loads") {
                let limits = bench.copy();
                bench.linear(limits, 8192, 8192, 8192);
                for shape in SHAPES {
                    let slots = bench.slots(shape, DType::Bf16);
                    loads(&mut bench, limits, shape, &slots);
                }
            } else if std::env::args().any(|a| a == "sampling") {
                let limits = bench.copy();
                sampling(&mut bench, limits);
            } else {
                operations(bench);
            }
        }
        Err(why) => println!("no benchmark: {why}"),
    }
}

/// Every operation.
fn operations(mut bench: Bench) {
    println!("{}", bench.gpu.describe());
    println!("{:<46} {:>10} {:>10} {:>10} {:>9}", "operation", "us", "TFLOP/s", "GB/s", "of copy");
    let limits = bench.copy();
    for (rows, n, k) in [(8192, 8192, 8192), (4096, 28672, 4096), (4096, 4096, 14336), (512, 4096, 4096)] {
        bench.linear(limits, rows, n, k);
    }
    for (rows, n, k) in
        [(1, 6144, 4096), (1, 4096, 4096), (1, 32000, 4096), (16, 6144, 4096), (64, 6144, 4096)]
    {
        bench.linear(limits, rows, n, k);
    }
    for shape in SHAPES {
        let slots = bench.slots(shape, DType::Bf16);
        loads(&mut bench, limits, shape, &slots);
        for tokens in [1, 8, 64] {
            bench.experts(limits, shape, &slots, tokens, 0.0);
        }
        for tokens in [1, 64, 4096] {
            bench.planned_experts(limits, shape, &slots, tokens);
        }
        drop(slots);
        for dtype in [DType::F8, DType::I4x2] {
            let slots = bench.slots(shape, dtype);
            for tokens in [1, 8, 64, 4096] {
                bench.experts(limits, shape, &slots, tokens, 0.0);
            }
        }
    }
    for (rows, experts, hidden) in
        [(1, 8, 4096), (64, 8, 4096), (4096, 8, 4096), (1, 256, 7168), (4096, 256, 7168)]
    {
        bench.router_product(limits, rows, experts, hidden);
    }
    bench.around_experts(limits, 4096);
    for (sequences, context) in [(1, 1024), (1, 8192), (64, 1024), (64, 4096)] {
        bench.decode_attention(limits, sequences, context);
    }
    for rows in [2048, 8192] {
        bench.prefill_attention(rows);
    }
    for (sequences, context) in [(1, 8192), (64, 4096)] {
        bench.decode_mla(limits, sequences, context);
    }
    bench.prefill_mla(2048);
    sampling(&mut bench, limits);
}

/// Experts of prompts, in even and in uneven shares.
fn loads(bench: &mut Bench, limits: Limits, shape: ExpertShape, slots: &[Option<Mlp>]) {
    for tokens in [4096, 16384] {
        for spread in [-1.0, 0.0, 1.0] {
            bench.experts(limits, shape, slots, tokens, spread);
        }
    }
}

/// Choosing tokens.
fn sampling(bench: &mut Bench, limits: Limits) {
    for (rows, vocab) in [(1, 32_000), (1, 129_280), (64, 129_280)] {
        bench.sampling(limits, rows, vocab);
    }
}

/// Products by every kernel there is for them.
fn kernels_of_products(mut bench: Bench) {
    let limits = bench.copy();
    for (rows, n, k) in [
        (8192, 8192, 8192),
        (4096, 28672, 4096),
        (512, 4096, 4096),
        (1, 6144, 4096),
        (1, 4096, 14336),
        (1, 32000, 4096),
        (16, 6144, 4096),
        (64, 6144, 4096),
    ] {
        bench.linear(limits, rows, n, k);
    }
    for shape in SHAPES {
        let slots = bench.slots(shape, DType::Bf16);
        for (tokens, spread) in [
            (64, 0.0),
            (256, 0.0),
            (1024, 1.0),
            (4096, -1.0),
            (4096, 0.0),
            (4096, 1.0),
            (16384, -1.0),
            (16384, 1.0),
        ] {
            bench.experts(limits, shape, &slots, tokens, spread);
        }
    }
}
