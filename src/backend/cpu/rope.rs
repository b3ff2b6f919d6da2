//! Rotary position embedding.

use super::CpuBackend;
use super::memory::{Rows, RowsMut};
use super::rows::{for_rows, load_next, store_next, with_float};
use super::simd::{Float, Kernel, Simd};
use crate::backend::{RopeArgs, ViewMut, check};
use crate::error::Result;

/// The rotating part of one head, pairs (i, i + half).
struct RotateHalves<'a, X> {
    x: &'a mut [X],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl<X: Float> Kernel for RotateHalves<'_, X> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let half = self.cos.len();
        assert!(self.sin.len() == half && self.x.len() == 2 * half, "{} of 2 x {half}", self.x.len());
        let (first, second) = self.x.split_at_mut(half);
        let (pa, pb) = (first.as_mut_ptr(), second.as_mut_ptr());
        for i in (0..half).step_by(S::LANES) {
            let n = (half - i).min(S::LANES);
            // SAFETY: `n` elements from `i` on are in each of the four.
            unsafe {
                let cos = load_next(simd, self.cos.as_ptr().add(i), n);
                let sin = load_next(simd, self.sin.as_ptr().add(i), n);
                let (a, b) = (load_next(simd, pa.add(i), n), load_next(simd, pb.add(i), n));
                store_next(simd, pa.add(i), n, simd.sub(simd.mul(a, cos), simd.mul(b, sin)));
                store_next(simd, pb.add(i), n, simd.add(simd.mul(b, cos), simd.mul(a, sin)));
            }
        }
    }
}

/// The rotating part of one head, pairs (2i, 2i + 1). Plain code: the parts are short (64 elements in DeepSeek).
fn rotate_pairs<X: Float>(x: &mut [X], cos: &[f32], sin: &[f32]) {
    for ((pair, cos), sin) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        let (a, b) = (pair[0].to_f32(), pair[1].to_f32());
        *pair = [X::from_f32(a * cos - b * sin), X::from_f32(b * cos + a * sin)];
    }
}

/// See [`crate::backend::Backend::rope`].
pub(super) fn rope(backend: &CpuBackend, x: ViewMut<'_>, args: RopeArgs<'_>) -> Result<()> {
    check::rope(&x, &args);
    let table = Rows::<f32>::new(args.table);
    with_float!(x.dtype(), X => {
        let x = RowsMut::<X>::new(x);
        for_rows(backend, x.rows(), x.cols(), &|range| {
            for i in range {
                let (cos, sin) = table.row(args.rows[i] as usize).split_at(args.dim / 2);
                for head in 0..args.heads {
                    let start = head * args.head_stride + args.offset;
                    // SAFETY: each row is written by one task.
                    let x = unsafe { x.part(i, start..start + args.dim) };
                    if args.interleaved {
                        rotate_pairs(x, cos, sin);
                    } else {
                        backend.dispatch(RotateHalves { x, cos, sin });
                    }
                }
            }
        })
    });
    Ok(())
}
