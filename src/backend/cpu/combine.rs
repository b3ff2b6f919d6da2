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

impl<X: Float> Kernel for CombineRow<'_, X> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for i in (0..self.out.len()).step_by(S::LANES) {
            let n = (self.out.len() - i).min(S::LANES);
            let mut total = simd.zero();
            for (index, &weight) in self.index.chunks_exact(self.parts).zip(self.weights) {
                let mut sum = simd.zero();
                for &row in index {
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
