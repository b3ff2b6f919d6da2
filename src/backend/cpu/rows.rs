//! What every operation on rows needs: dividing them among threads, choosing the element type, walking along one.

use std::ops::Range;

use super::CpuBackend;
use super::pool::try_lock;
use super::simd::{Float, Simd};

/// Elements worth a task of their own: a few microseconds of streaming, more than waking a thread costs.
const GRAIN: usize = 8 * 1024;

/// Runs `body` on ranges that together are `0..rows`, on all threads where `rows * cols` elements are worth it: a row mostly on the
/// thread that had it in the operation before. For operations that treat every row by itself, so that the division cannot show in
/// the result.
pub(super) fn for_rows(backend: &CpuBackend, rows: usize, cols: usize, body: &(dyn Fn(Range<usize>) + Sync)) {
    let per_task = (GRAIN / cols.max(1)).max(1);
    for_tasks(backend, rows.div_ceil(per_task), &|task| {
        let first = task * per_task;
        body(first..rows.min(first + per_task));
    });
}

/// Calls `body(0)`, ..., `body(tasks - 1)` on the backend's threads. Each starts with a share of its own, so that what belongs to a row
/// or a sequence stays in the cache of one core from operation to operation.
pub(super) fn for_tasks(backend: &CpuBackend, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
    let count = u32::try_from(tasks).expect("fewer tasks than 2^32");
    let each = |tasks: Range<u32>| tasks.for_each(|task| body(task as usize));
    // Inside another operation on rows the threads are at work.
    match try_lock(&backend.scratch.rows) {
        Some(mut shares) if tasks > 1 => shares.deal(backend.pool(), count, &each),
        _ => each(0..count),
    }
}

/// `body` with the name `$T` standing for the Rust type of a floating point [`crate::backend::DType`].
macro_rules! with_float {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::backend::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::backend::DType::Bf16 => {
                type $T = half::bf16;
                $body
            }
            other => panic!("{other:?} where floating point numbers belong"),
        }
    };
}
pub(super) use with_float;

/// The next `n <= LANES` elements of a row, zero in the other lanes. `n` is less than `LANES` at the row's end only.
///
/// # Safety
/// `from` has `n` elements.
#[inline(always)]
pub(super) unsafe fn load_next<S: Simd, T: Float>(simd: S, from: *const T, n: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { if n >= S::LANES { T::load(simd, from) } else { T::load_head(simd, from, n) } }
}

/// The first `n <= LANES` lanes to the next elements of a row, rounded to its type.
///
/// # Safety
/// `to` has `n` elements.
#[inline(always)]
pub(super) unsafe fn store_next<S: Simd, T: Float>(simd: S, to: *mut T, n: usize, v: S::V) {
    // SAFETY: the caller's promise.
    unsafe { if n >= S::LANES { T::store(simd, to, v) } else { T::store_head(simd, to, n, v) } }
}

#[cfg(test)]
mod tests;
