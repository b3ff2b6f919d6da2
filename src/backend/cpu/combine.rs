//! Expert outputs back to tokens, summed in top-k order.

use super::CpuBackend;
use super::memory::{Rows, RowsMut};
use super::rows::{for_rows, load_next, store_next, with_float};
use super::simd::{Float, Kernel, Simd};
use crate::backend::{CombineArgs, ViewMut, check};
use crate::error::Result;

/// One token: `out = sum_j weights[j] * sum_x rows[index[j * parts + x]]`.
struct CombineRow<'a, X> {
    rows: Rows<'a, X>,
    index: &'a [u32],
    parts: usize,
    weights: &'a [f32],
    out: &'a mut [f32],
}

/// Vectors of a row that are summed together, so that finding a row costs little.
const VECTORS: usize = 4;

impl<X: Float> CombineRow<'_, X> {
    /// Rows and weight of each choice.
    #[inline(always)]
    fn choices(&self) -> impl Iterator<Item = (&[u32], f32)> {
        self.index.chunks_exact(self.parts).zip(self.weights.iter().copied())
    }
}

impl<X: Float> Kernel for CombineRow<'_, X> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (len, together) = (self.out.len(), VECTORS * S::LANES);
        let whole = len - len % together;
        for i in (0..whole).step_by(together) {
            let mut totals = [simd.zero(); VECTORS];
            for (rows, weight) in self.choices() {
                let mut sums = [simd.zero(); VECTORS];
                for &row in rows {
                    let row = self.rows.row(row as usize).as_ptr();
                    for (v, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: a row has as many columns as `out`.
                        *sum = simd.add(*sum, unsafe { X::load(simd, row.add(i + v * S::LANES)) });
                    }
                }
                let weight = simd.splat(weight);
                for (total, &sum) in totals.iter_mut().zip(&sums) {
                    *total = simd.fma(weight, sum, *total);
                }
            }
            for (v, &total) in totals.iter().enumerate() {
                // SAFETY: whole vectors of the row.
                unsafe { simd.store(self.out.as_mut_ptr().add(i + v * S::LANES), total) };
            }
        }
        for i in (whole..len).step_by(S::LANES) {
            let n = (len - i).min(S::LANES);
            let mut total = simd.zero();
            for (rows, weight) in self.choices() {
                let mut sum = simd.zero();
                for &row in rows {
                    // SAFETY: a row has as many columns as `out`; `row` panics where there is none.
                    sum = simd
                        .add(sum, unsafe { load_next(simd, self.rows.row(row as usize).as_ptr().add(i), n) });
                }
                total = simd.fma(simd.splat(weight), sum, total);
            }
            // SAFETY: `n` elements from `i` on are in the row.
            unsafe { store_next(simd, self.out.as_mut_ptr().add(i), n, total) };
        }
    }
}

/// See [`crate::backend::Backend::combine`].
pub(super) fn combine(backend: &CpuBackend, args: CombineArgs<'_>, out: ViewMut<'_>) -> Result<()> {
    check::combine(&args, &out);
    let out = RowsMut::<f32>::new(out);
    let weights = Rows::<f32>::new(args.weights);
    let choices = weights.cols() * args.parts;
    with_float!(args.rows.dtype(), X => {
        let rows = Rows::<X>::new(args.rows);
        for_rows(backend, out.rows(), out.cols() * choices.max(1), &|range| {
            for t in range {
                backend.dispatch(CombineRow {
                    rows,
                    index: &args.index[t * choices..][..choices],
                    parts: args.parts,
                    weights: weights.row(t),
                    // SAFETY: each row is written by one task.
                    out: unsafe { out.part(t, 0..out.cols()) },
                });
            }
        })
    });
    Ok(())
}
