//! What this machine can do, measured: the yardstick of the benches. Machines are shared and their clocks vary, so a ratio to a
//! limit of the same minute says more than a number. Each function returns the speeds of several short runs: take of them the
//! statistic that is taken of what they are compared with.

use std::hint::black_box;
use std::time::Instant;

use super::CpuBackend;
use super::memory::{self, Rows};
use super::simd::{Kernel, Simd};
use crate::backend::DType;
use crate::error::Result;

/// Runs of one measurement.
const ROUNDS: usize = 30;
/// Steps of [`Multiply`] per task and tasks per thread: a few milliseconds together.
const STEPS: usize = 20_000;
const TASKS_PER_THREAD: usize = 16;
/// f32 that one task of the bandwidth measurement reads: 1 MiB.
const PIECE: usize = 1 << 18;

/// Multiplications and additions in f32 per second of all threads, in units of 10^9.
pub fn f32_gflops(backend: &CpuBackend) -> Vec<f64> {
    gflops(backend, false)
}

/// [`f32_gflops`] of the instruction for bf16 pairs; without one, that of f32, which is what bf16 is widened to.
pub fn bf16_gflops(backend: &CpuBackend) -> Vec<f64> {
    gflops(backend, true)
}

fn gflops(backend: &CpuBackend, pairs: bool) -> Vec<f64> {
    let tasks = TASKS_PER_THREAD * backend.pool().threads();
    let flops = backend.dispatch(FlopsPerStep { pairs });
    speeds(tasks * STEPS * flops, || {
        backend.pool().run(tasks, &|_| {
            black_box(backend.dispatch(Multiply { pairs }));
        });
    })
}

/// GB/s (10^9 bytes) of all threads reading `bytes` of memory in order; far more than the caches hold, to be about memory.
///
/// # Errors
/// [`crate::Error::Memory`] when so much memory is refused.
pub fn read_gbytes(backend: &CpuBackend, bytes: usize) -> Result<Vec<f64>> {
    let pieces = (bytes / 4 / PIECE).max(1);
    let mut tensor = memory::tensor(DType::F32, pieces, PIECE)?;
    let data = memory::RowsMut::<f32>::new(tensor.view_mut());
    // SAFETY: each row is written by one task. Written, so that every page exists.
    backend.pool().run(pieces, &|piece| unsafe { data.part(piece, 0..PIECE) }.fill(1.0));
    let data = Rows::<f32>::new(tensor.view());
    Ok(speeds(pieces * PIECE * 4, || {
        backend.pool().run(pieces, &|piece| {
            black_box(backend.dispatch(Sum(data.row(piece))));
        });
    }))
}

/// `amount` per second of several runs, in units of 10^9.
fn speeds(amount: usize, run: impl Fn()) -> Vec<f64> {
    let speed = |_| {
        let start = Instant::now();
        run();
        amount as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..ROUNDS).map(speed).collect()
}

/// Independent chains that keep every multiplier busy.
const CHAINS: usize = 12;

struct FlopsPerStep {
    pairs: bool,
}

impl Kernel for FlopsPerStep {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        let products = if self.pairs && S::NATIVE_DOT { 2 } else { 1 };
        CHAINS * S::LANES * products * 2
    }
}

/// [`STEPS`] times [`CHAINS`] multiplications in registers.
struct Multiply {
    pairs: bool,
}

impl Kernel for Multiply {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut acc = [simd.zero(); CHAINS];
        if self.pairs && S::NATIVE_DOT {
            let (a, b) = (simd.splat_pair(black_box(0x3f80_3f80)), simd.splat_pair(black_box(0x3c00_3c00)));
            for _ in 0..STEPS {
                for acc in &mut acc {
                    *acc = simd.dot(*acc, a, b);
                }
            }
        } else {
            let (a, b) = (simd.splat(black_box(0.5)), simd.splat(black_box(1.25)));
            for _ in 0..STEPS {
                for acc in &mut acc {
                    *acc = simd.fma(*acc, a, b);
                }
            }
        }
        acc.into_iter().map(|acc| simd.sum(acc)).sum()
    }
}

/// Reads everything once.
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut acc = [simd.zero(); 8];
        for piece in self.0.chunks_exact(8 * S::LANES) {
            for (number, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the piece holds eight vectors.
                *acc = simd.add(*acc, unsafe { simd.load(piece.as_ptr().add(number * S::LANES)) });
            }
        }
        acc.into_iter().map(|acc| simd.sum(acc)).sum()
    }
}
