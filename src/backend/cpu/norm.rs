//! Layer norms: one row (or one head of a row) at a time, in two or three passes over the cache.

use super::CpuBackend;
use super::memory::{Rows, RowsMut};
use super::rows::{for_rows, load_next, store_next, with_float};
use super::simd::{Float, Kernel, Simd};
use crate::backend::{AddNormArgs, DType, NormArgs, View, ViewMut, check};
use crate::error::Result;
use crate::spec::NormKind;

/// `sum_i (x[i] - mean)^2`, or `sum_i x[i]`; see [`sum`].
#[derive(Clone, Copy)]
enum Term {
    Plain,
    SquareFrom(f32),
}

/// Sum over a vector, lane by lane and then over the lanes. Lanes past the end take no part.
///
/// # Safety
/// `x` has `len` elements.
#[inline(always)]
unsafe fn sum<S: Simd, X: Float>(simd: S, x: *const X, len: usize, term: Term) -> f32 {
    let mut total = simd.zero();
    for i in (0..len).step_by(S::LANES) {
        let n = (len - i).min(S::LANES);
        // SAFETY: `n` elements from `i` on belong to the vector.
        let v = unsafe { load_next(simd, x.add(i), n) };
        total = match term {
            Term::Plain => simd.add(total, v),
            Term::SquareFrom(mean) => {
                let d = simd.sub(v, simd.splat(mean));
                // A padded lane would add mean^2.
                let d = if n == S::LANES { d } else { head(simd, d, n) };
                simd.fma(d, d, total)
            }
        };
    }
    simd.sum(total)
}

/// The first `n` lanes, zero in the others.
#[inline(always)]
fn head<S: Simd>(simd: S, v: S::V, n: usize) -> S::V {
    let lanes = simd.to_array(v);
    // SAFETY: an array of at least LANES elements.
    unsafe { simd.load_head(lanes.as_ptr(), n) }
}

/// `y = (x - mean) * factor * weight (+ bias)`
///
/// # Safety
/// `x`, `y`, `weight` and `bias` have `len` elements; `x` may be `y`.
#[inline(always)]
unsafe fn apply<S: Simd, X: Float, Y: Float>(
    simd: S,
    x: *const X,
    y: *mut Y,
    len: usize,
    affine: &Affine<'_>,
    (mean, factor): (f32, f32),
) {
    let (mean, factor) = (simd.splat(mean), simd.splat(factor));
    for i in (0..len).step_by(S::LANES) {
        let n = (len - i).min(S::LANES);
        // SAFETY: `n` elements from `i` on belong to each vector.
        unsafe {
            let weight = load_next(simd, affine.weight.as_ptr().add(i), n);
            let v = simd.sub(load_next(simd, x.add(i), n), mean);
            let v = simd.mul(simd.mul(v, factor), weight);
            let v = match affine.bias {
                Some(bias) => simd.add(v, load_next(simd, bias.as_ptr().add(i), n)),
                None => v,
            };
            store_next(simd, y.add(i), n, v);
        }
    }
}

/// What follows the normalisation.
struct Affine<'a> {
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
}

/// One row through [`crate::backend::Backend::norm`], in place or not.
struct NormRow<'a, X, Y> {
    x: *const X,
    y: *mut Y,
    cols: usize,
    kind: NormKind,
    eps: f32,
    affine: &'a Affine<'a>,
}

impl<X: Float, Y: Float> Kernel for NormRow<'_, X, Y> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.affine.weight.len();
        for start in (0..self.cols).step_by(width) {
            // SAFETY: rows of `cols` elements, in groups of `width`, which divides them.
            unsafe {
                let (x, y) = (self.x.add(start), self.y.add(start));
                apply(simd, x, y, width, self.affine, scaling(simd, x, width, self.kind, self.eps));
            }
        }
    }
}

/// What a vector is normed with: the mean that is subtracted, and the factor.
///
/// # Safety
/// `x` has `len` elements.
#[inline(always)]
unsafe fn scaling<S: Simd, X: Float>(
    simd: S,
    x: *const X,
    len: usize,
    kind: NormKind,
    eps: f32,
) -> (f32, f32) {
    let n = len as f32;
    // SAFETY: the caller's promise.
    unsafe {
        let mean = match kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => sum(simd, x, len, Term::Plain) / n,
        };
        let variance = sum(simd, x, len, Term::SquareFrom(mean)) / n;
        (mean, 1.0 / (variance + eps).sqrt())
    }
}

/// One row through [`crate::backend::Backend::add_norm`], while it is in the cache.
struct AddNormRow<'a, A, Y> {
    x: &'a mut [f32],
    addend: Option<(&'a [A], f32)>,
    kind: NormKind,
    eps: f32,
    affine: &'a Affine<'a>,
    exact: Option<&'a mut [f32]>,
    rounded: &'a mut [Y],
}

impl<A: Float, Y: Float> Kernel for AddNormRow<'_, A, Y> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let (len, width) = (self.x.len(), self.affine.weight.len());
        let x = self.x.as_mut_ptr();
        if let Some((addend, factor)) = self.addend {
            let factor = simd.splat(factor);
            for i in (0..len).step_by(S::LANES) {
                let n = (len - i).min(S::LANES);
                // SAFETY: `n` elements from `i` on are in both rows.
                unsafe {
                    let sum = simd.fma(
                        load_next(simd, addend.as_ptr().add(i), n),
                        factor,
                        load_next(simd, x.add(i), n),
                    );
                    store_next(simd, x.add(i), n, sum);
                }
            }
        }
        for start in (0..len).step_by(width) {
            // SAFETY: all rows have the same number of elements, in groups of `width`, which divides it.
            unsafe {
                let x = x.add(start).cast_const();
                let scaling = scaling(simd, x, width, self.kind, self.eps);
                if let Some(exact) = &mut self.exact {
                    apply(simd, x, exact.as_mut_ptr().add(start), width, self.affine, scaling);
                }
                apply(simd, x, self.rounded.as_mut_ptr().add(start), width, self.affine, scaling);
            }
        }
    }
}

/// Sum of squares of one row.
struct SquareSum<'a, X>(&'a [X]);

impl<X: Float> Kernel for SquareSum<'_, X> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        // SAFETY: the slice's own length.
        unsafe { sum(simd, self.0.as_ptr(), self.0.len(), Term::SquareFrom(0.0)) }
    }
}

/// `y *= factor * weight` on one row.
struct ScaleRow<'a, Y> {
    y: &'a mut [Y],
    factor: f32,
    affine: &'a Affine<'a>,
}

impl<Y: Float> Kernel for ScaleRow<'_, Y> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let y = self.y.as_mut_ptr();
        // SAFETY: the row and the weight have equal lengths (checked by the caller's shapes).
        unsafe { apply(simd, y.cast_const(), y, self.y.len(), self.affine, (0.0, self.factor)) }
    }
}

/// See [`crate::backend::Backend::norm`].
pub(super) fn norm(backend: &CpuBackend, x: View<'_>, args: NormArgs<'_>, out: ViewMut<'_>) -> Result<()> {
    check::norm(&x, &args, &out.as_view());
    with_float!(x.dtype(), X => with_float!(out.dtype(), Y => {
        let (x, out) = (Rows::<X>::new(x), RowsMut::<Y>::new(out));
        norm_rows(backend, args, (out.rows(), out.cols()), |i| {
            // SAFETY: each row is written by one task.
            let y = unsafe { out.part(i, 0..out.cols()) };
            (x.row(i).as_ptr(), y.as_mut_ptr())
        })
    }));
    Ok(())
}

/// See [`crate::backend::Backend::norm_inplace`].
pub(super) fn norm_inplace(backend: &CpuBackend, x: ViewMut<'_>, args: NormArgs<'_>) -> Result<()> {
    check::norm(&x.as_view(), &args, &x.as_view());
    with_float!(x.dtype(), X => {
        let x = RowsMut::<X>::new(x);
        norm_rows(backend, args, (x.rows(), x.cols()), |i| {
            // SAFETY: each row is written by one task.
            let row = unsafe { x.part(i, 0..x.cols()) }.as_mut_ptr();
            (row.cast_const(), row)
        })
    });
    Ok(())
}

/// See [`crate::backend::Backend::add_norm`].
pub(super) fn add_norm(backend: &CpuBackend, x: ViewMut<'_>, args: AddNormArgs<'_>) -> Result<()> {
    check::add_norm(&x, &args);
    let addend_type = args.addend.as_ref().map_or(DType::F32, |(addend, _)| addend.dtype());
    with_float!(addend_type, A => with_float!(args.rounded.dtype(), Y => add_norm_rows::<A, Y>(backend, x, args)));
    Ok(())
}

fn add_norm_rows<A: Float, Y: Float>(backend: &CpuBackend, x: ViewMut<'_>, args: AddNormArgs<'_>) {
    let AddNormArgs { addend, norm, exact, rounded } = args;
    let affine =
        Affine { weight: Rows::new(norm.weight).row(0), bias: norm.bias.map(|bias| Rows::new(bias).row(0)) };
    let (x, rounded) = (RowsMut::<f32>::new(x), RowsMut::<Y>::new(rounded));
    let addend = addend.map(|(addend, factor)| (Rows::<A>::new(addend), factor));
    let exact = exact.map(RowsMut::<f32>::new);
    let cols = x.cols();
    for_rows(backend, x.rows(), cols, &|range| {
        for i in range {
            // SAFETY: each row is read and written by one task.
            let row = unsafe {
                AddNormRow {
                    x: x.part(i, 0..cols),
                    addend: addend.map(|(addend, factor)| (addend.row(i), factor)),
                    kind: norm.kind,
                    eps: norm.eps,
                    affine: &affine,
                    exact: exact.as_ref().map(|exact| exact.part(i, 0..cols)),
                    rounded: rounded.part(i, 0..cols),
                }
            };
            backend.dispatch(row);
        }
    });
}

/// Norms every row; `row(i)` is where it is read and written, `cols` elements each.
fn norm_rows<X: Float, Y: Float>(
    backend: &CpuBackend,
    args: NormArgs<'_>,
    (rows, cols): (usize, usize),
    row: impl Fn(usize) -> (*const X, *mut Y) + Sync,
) {
    let affine =
        Affine { weight: Rows::new(args.weight).row(0), bias: args.bias.map(|bias| Rows::new(bias).row(0)) };
    for_rows(backend, rows, cols, &|range| {
        for i in range {
            let (x, y) = row(i);
            backend.dispatch(NormRow { x, y, cols, kind: args.kind, eps: args.eps, affine: &affine });
        }
    });
}

/// See [`crate::backend::Backend::square_sum`].
pub(super) fn square_sum(backend: &CpuBackend, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
    check::square_sum(&x, &out);
    let out = RowsMut::<f32>::new(out);
    with_float!(x.dtype(), X => {
        let x = Rows::<X>::new(x);
        for_rows(backend, x.rows(), x.cols(), &|range| {
            for i in range {
                // SAFETY: each row is written by one task.
                let sum = unsafe { out.part(i, 0..1) };
                sum[0] = backend.dispatch(SquareSum(x.row(i)));
            }
        })
    });
    Ok(())
}

/// See [`crate::backend::Backend::scale_by_square_sum`].
pub(super) fn scale_by_square_sum(
    backend: &CpuBackend,
    sums: View<'_>,
    width: usize,
    eps: f32,
    weight: View<'_>,
    x: ViewMut<'_>,
) -> Result<()> {
    check::scale_by_square_sum(&sums, width, &weight, &x);
    let sums = Rows::<f32>::new(sums);
    let affine = Affine { weight: Rows::new(weight).row(0), bias: None };
    with_float!(x.dtype(), X => {
        let x = RowsMut::<X>::new(x);
        for_rows(backend, x.rows(), x.cols(), &|range| {
            for i in range {
                let factor = 1.0 / (sums.row(i)[0] / width as f32 + eps).sqrt();
                // SAFETY: each row is written by one task.
                let y = unsafe { x.part(i, 0..x.cols()) };
                backend.dispatch(ScaleRow { y, factor, affine: &affine });
            }
        })
    });
    Ok(())
}
