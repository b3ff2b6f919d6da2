//! Operations on single elements and copies of rows: bound by memory, so one pass each.

use std::ops::Range;

use half::bf16;

use super::CpuBackend;
use super::memory::{Element, Rows, RowsMut};
use super::rows::{for_rows, load_next, store_next, with_float};
use super::simd::{Float, Kernel, Simd, sigmoid};
use crate::backend::{DType, View, ViewMut, check};
use crate::error::Result;

/// `y = f(x, y)` on vectors.
trait Op: Copy + Send + Sync {
    fn apply<S: Simd>(self, simd: S, x: S::V, y: S::V) -> S::V;
}

/// Applies an operation to two rows of equal length.
struct Zip<'a, X, Y, O> {
    x: &'a [X],
    y: &'a mut [Y],
    op: O,
}

impl<X: Float, Y: Float, O: Op> Kernel for Zip<'_, X, Y, O> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let len = self.y.len();
        assert_eq!(self.x.len(), len, "rows of one operation");
        let (x, y) = (self.x.as_ptr(), self.y.as_mut_ptr());
        for i in (0..len).step_by(S::LANES) {
            let n = (len - i).min(S::LANES);
            // SAFETY: `n` elements from `i` on are in both rows.
            unsafe {
                let v = self.op.apply(simd, load_next(simd, x.add(i), n), load_next(simd, y.add(i), n));
                store_next(simd, y.add(i), n, v);
            }
        }
    }
}

/// Applies an operation to a row in place: x and y are the same.
struct InPlace<'a, Y, O> {
    y: &'a mut [Y],
    op: O,
}

impl<Y: Float, O: Op> Kernel for InPlace<'_, Y, O> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let len = self.y.len();
        let y = self.y.as_mut_ptr();
        for i in (0..len).step_by(S::LANES) {
            let n = (len - i).min(S::LANES);
            // SAFETY: `n` elements from `i` on are in the row.
            unsafe {
                let v = load_next(simd, y.add(i), n);
                store_next(simd, y.add(i), n, self.op.apply(simd, v, v));
            }
        }
    }
}

/// `x`
#[derive(Clone, Copy)]
struct Copied;
impl Op for Copied {
    #[inline(always)]
    fn apply<S: Simd>(self, _: S, x: S::V, _: S::V) -> S::V {
        x
    }
}

/// `x * factor`
#[derive(Clone, Copy)]
struct Scaled(f32);
impl Op for Scaled {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::V, _: S::V) -> S::V {
        simd.mul(x, simd.splat(self.0))
    }
}

/// `y + x * factor`
#[derive(Clone, Copy)]
struct AddScaled(f32);
impl Op for AddScaled {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::V, y: S::V) -> S::V {
        simd.fma(x, simd.splat(self.0), y)
    }
}

/// `min(max(x, -limit), limit)`
#[derive(Clone, Copy)]
struct Clamped(f32);
impl Op for Clamped {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::V, _: S::V) -> S::V {
        simd.min(simd.splat(self.0), simd.max(simd.splat(-self.0), x))
    }
}

/// `sigmoid(gate)` in one lane.
struct Sigmoid(f32);
impl Kernel for Sigmoid {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        simd.to_array(sigmoid(simd, simd.splat(self.0)))[0]
    }
}

/// One row to another, converted; also how other kernels round a row to its type.
pub(super) fn convert_row<X: Float, Y: Float>(backend: &CpuBackend, x: &[X], y: &mut [Y]) {
    backend.dispatch(Zip { x, y, op: Copied });
}

/// Rows of activations of either type: for kernels that would else be compiled for each.
pub(super) enum FloatRows<'a> {
    /// Single precision.
    F32(Rows<'a, f32>),
    /// bfloat16.
    Bf16(Rows<'a, bf16>),
}

impl<'a> FloatRows<'a> {
    /// See [`Rows::new`].
    pub(super) fn new(view: View<'a>) -> Self {
        match view.dtype() {
            DType::Bf16 => FloatRows::Bf16(Rows::new(view)),
            _ => FloatRows::F32(Rows::new(view)),
        }
    }

    /// Some columns of a row, converted, to the front of `to`, zeros to the rest of it.
    pub(super) fn read<T: Float>(&self, backend: &CpuBackend, row: usize, cols: Range<usize>, to: &mut [T]) {
        let (head, padding) = to.split_at_mut(cols.len());
        match self {
            FloatRows::F32(rows) => convert_row(backend, &rows.row(row)[cols], head),
            FloatRows::Bf16(rows) => convert_row(backend, &rows.row(row)[cols], head),
        }
        padding.fill(T::default());
    }
}

/// Rows of activations, written from f32 and rounded to their type.
pub(super) enum FloatRowsMut<'a> {
    /// Single precision.
    F32(RowsMut<'a, f32>),
    /// bfloat16.
    Bf16(RowsMut<'a, bf16>),
}

impl<'a> FloatRowsMut<'a> {
    /// See [`RowsMut::new`].
    pub(super) fn new(view: ViewMut<'a>) -> Self {
        match view.dtype() {
            DType::Bf16 => FloatRowsMut::Bf16(RowsMut::new(view)),
            _ => FloatRowsMut::F32(RowsMut::new(view)),
        }
    }

    /// The front of `from` to some columns of a row.
    ///
    /// # Safety
    /// Nobody else reads or writes these elements meanwhile.
    pub(super) unsafe fn write(&self, backend: &CpuBackend, row: usize, cols: Range<usize>, from: &[f32]) {
        let from = &from[..cols.len()];
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                FloatRowsMut::F32(rows) => convert_row(backend, from, rows.part(row, cols)),
                FloatRowsMut::Bf16(rows) => convert_row(backend, from, rows.part(row, cols)),
            }
        }
    }
}

/// `dst[i] = src[from(i)]`, bits as they are.
fn copy_same<T: Element>(
    backend: &CpuBackend,
    src: View<'_>,
    dst: ViewMut<'_>,
    from: &(dyn Fn(usize) -> usize + Sync),
) {
    let (src, dst) = (Rows::<T>::new(src), RowsMut::<T>::new(dst));
    for_rows(backend, dst.rows(), dst.cols(), &|range| {
        for i in range {
            // SAFETY: each row is written by one task.
            unsafe { dst.part(i, 0..dst.cols()) }.copy_from_slice(src.row(from(i)));
        }
    });
}

/// [`copy_same`] for any type.
fn copy_any(backend: &CpuBackend, src: View<'_>, dst: ViewMut<'_>, from: &(dyn Fn(usize) -> usize + Sync)) {
    match src.dtype() {
        DType::I32 => copy_same::<i32>(backend, src, dst, from),
        DType::I8 => copy_same::<i8>(backend, src, dst, from),
        float => with_float!(float, T => copy_same::<T>(backend, src, dst, from)),
    }
}

/// `y[i] = op(x[from(i)], y[i])` on all rows.
fn zip_rows<X: Float, Y: Float, O: Op>(
    backend: &CpuBackend,
    x: View<'_>,
    y: ViewMut<'_>,
    from: impl Fn(usize) -> usize + Sync,
    op: O,
) {
    let (x, y) = (Rows::<X>::new(x), RowsMut::<Y>::new(y));
    for_rows(backend, y.rows(), y.cols(), &|range| {
        for i in range {
            // SAFETY: each row is written by one task.
            let row = unsafe { y.part(i, 0..y.cols()) };
            backend.dispatch(Zip { x: x.row(from(i)), y: row, op });
        }
    });
}

/// `y[i] = op(i)(y[i])` on all rows.
fn map_rows<Y: Float, O: Op>(backend: &CpuBackend, y: ViewMut<'_>, op: impl Fn(usize) -> O + Sync) {
    let y = RowsMut::<Y>::new(y);
    for_rows(backend, y.rows(), y.cols(), &|range| {
        for i in range {
            // SAFETY: each row is written by one task.
            let row = unsafe { y.part(i, 0..y.cols()) };
            backend.dispatch(InPlace { y: row, op: op(i) });
        }
    });
}

/// See [`crate::backend::Backend::upload`].
pub(super) fn upload(_: &CpuBackend, src: &[u8], dst: ViewMut<'_>) -> Result<()> {
    check::transfer(src.len(), &dst.as_view());
    match dst.dtype() {
        DType::I32 => upload_as::<i32>(src, dst),
        DType::I8 => upload_as::<i8>(src, dst),
        float => with_float!(float, T => upload_as::<T>(src, dst)),
    }
    Ok(())
}

fn upload_as<T: Element + bytemuck::Pod>(src: &[u8], dst: ViewMut<'_>) {
    let mut dst = RowsMut::<T>::new(dst);
    let row_bytes = dst.cols() * size_of::<T>();
    for i in 0..dst.rows() {
        bytemuck::cast_slice_mut(dst.row_mut(i)).copy_from_slice(&src[i * row_bytes..][..row_bytes]);
    }
}

/// See [`crate::backend::Backend::download`].
pub(super) fn download(_: &CpuBackend, src: View<'_>, dst: &mut [u8]) -> Result<()> {
    check::transfer(dst.len(), &src);
    match src.dtype() {
        DType::I32 => download_as::<i32>(src, dst),
        DType::I8 => download_as::<i8>(src, dst),
        float => with_float!(float, T => download_as::<T>(src, dst)),
    }
    Ok(())
}

fn download_as<T: Element + bytemuck::Pod>(src: View<'_>, dst: &mut [u8]) {
    let src = Rows::<T>::new(src);
    let row_bytes = src.cols() * size_of::<T>();
    for i in 0..src.rows() {
        dst[i * row_bytes..][..row_bytes].copy_from_slice(bytemuck::cast_slice(src.row(i)));
    }
}

/// See [`crate::backend::Backend::copy_rows`].
pub(super) fn copy_rows(backend: &CpuBackend, src: View<'_>, dst: ViewMut<'_>) -> Result<()> {
    check::copy_rows(&src, &dst);
    if src.dtype() == dst.dtype() {
        copy_any(backend, src, dst, &|i| i);
    } else {
        with_float!(src.dtype(), X => with_float!(dst.dtype(), Y => {
            zip_rows::<X, Y, _>(backend, src, dst, |i| i, Copied)
        }));
    }
    Ok(())
}

/// See [`crate::backend::Backend::gather_rows`].
pub(super) fn gather_rows(
    backend: &CpuBackend,
    src: View<'_>,
    index: &[u32],
    dst: ViewMut<'_>,
) -> Result<()> {
    check::gather_rows(&src, index, &dst);
    copy_any(backend, src, dst, &|i| index[i] as usize);
    Ok(())
}

/// See [`crate::backend::Backend::embed`].
pub(super) fn embed(
    backend: &CpuBackend,
    table: View<'_>,
    ids: &[u32],
    scale: f32,
    out: ViewMut<'_>,
) -> Result<()> {
    check::embed(&table, ids, &out);
    with_float!(table.dtype(), T => {
        zip_rows::<T, f32, _>(backend, table, out, |i| ids[i] as usize, Scaled(scale))
    });
    Ok(())
}

/// See [`crate::backend::Backend::add_scaled`].
pub(super) fn add_scaled(backend: &CpuBackend, x: View<'_>, scale: f32, y: ViewMut<'_>) -> Result<()> {
    check::add_scaled(&x, &y);
    with_float!(x.dtype(), X => zip_rows::<X, f32, _>(backend, x, y, |i| i, AddScaled(scale)));
    Ok(())
}

/// See [`crate::backend::Backend::scale`].
pub(super) fn scale(backend: &CpuBackend, scale: f32, x: ViewMut<'_>) -> Result<()> {
    check::scale(&x);
    map_rows::<f32, _>(backend, x, |_| Scaled(scale));
    Ok(())
}

/// See [`crate::backend::Backend::clamp`].
pub(super) fn clamp(backend: &CpuBackend, limit: f32, x: ViewMut<'_>) -> Result<()> {
    check::clamp(limit, &x);
    with_float!(x.dtype(), X => map_rows::<X, _>(backend, x, |_| Clamped(limit)));
    Ok(())
}

/// See [`crate::backend::Backend::sigmoid_gate`].
pub(super) fn sigmoid_gate(backend: &CpuBackend, gate: View<'_>, x: ViewMut<'_>) -> Result<()> {
    check::sigmoid_gate(&gate, &x);
    let gate = Rows::<f32>::new(gate);
    map_rows::<f32, _>(backend, x, |i| Scaled(backend.dispatch(Sigmoid(gate.row(i)[0]))));
    Ok(())
}
