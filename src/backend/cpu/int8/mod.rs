//! Experts with weights in 8 bits; [`crate::backend::int8`] says what the numbers are. The work is shared out as that of other types is:
//! a pass over gate and up, one over down. Rows are quantised before the first, and those of a slot again before its second.

mod pack;
mod product;
mod rows;

use std::ops::Range;

use super::CpuBackend;
use super::experts::{Between, Grouped, Sides, activate};
use super::memory::{Rows, with_local_scratch};
use super::operand::{Form, Output, row_stride};
use super::panel::{Cut, PANEL, panels};
use super::rows::with_float;
use super::simd::{Float, Kernel, Simd};
use super::work::{Items, TwoPasses};
use crate::backend::{DType, HostMlp, Mlp, Tensor, View, ViewMut, int8};
use crate::error::Result;
use crate::spec::Activation;
use pack::Panels;
use product::PanelProduct;
use rows::QuantizedRows;

/// Parts of a packed [`Mlp`], in order; the two biases are there together or not at all. The scales of gate and up lie as their panels
/// do, [`PANEL`] of each in turn.
const GATE_UP: usize = 0;
const DOWN: usize = 1;
const GATE_UP_SCALES: usize = 2;
const DOWN_SCALES: usize = 3;
const GATE_UP_BIAS: usize = 4;
const DOWN_BIAS: usize = 5;

/// See [`crate::backend::Backend::pack_mlp`]; `biases` are packed already.
pub(super) fn pack_mlp(backend: &CpuBackend, host: &HostMlp<'_>, biases: Vec<Tensor>) -> Result<Mlp> {
    let (intermediate, hidden) = (host.gate.n, host.gate.k);
    let widest = intermediate.max(hidden);
    assert!(
        widest <= int8::MAX_INPUTS,
        "{widest} inputs of a matrix in 8 bits, {} at most",
        int8::MAX_INPUTS
    );
    let (gate_up, gate_up_scales) = pack::pack(backend, &[&host.gate, &host.up])?;
    let (down, down_scales) = pack::pack(backend, &[&host.down])?;
    let mut parts = vec![gate_up, down, gate_up_scales, down_scales];
    parts.extend(biases);
    Ok(Mlp { parts, hidden, intermediate })
}

/// Bytes of the scales of an MLP.
pub(super) fn scale_bytes(hidden: usize, intermediate: usize) -> usize {
    let scales = panels(intermediate).saturating_mul(2).saturating_add(panels(hidden));
    scales.saturating_mul(PANEL * DType::F32.bytes())
}

/// See [`crate::backend::Backend::experts`]; so many rows, and the width of the widest MLP.
pub(super) fn experts(
    backend: &CpuBackend,
    grouped: &Grouped<'_>,
    (rows, width): (usize, usize),
    x: Sides<View<'_>>,
    out: Sides<ViewMut<'_>>,
) -> Result<()> {
    let first = x.any().expect("rows that are used");
    let (dtype, cols) = (first.dtype(), first.cols());
    let form = if dtype == DType::Bf16 { Form::Pairs } else { Form::F32 };
    let stride = row_stride(width, form);
    let out = out.map(Output::new);
    // The rows of the second product take the place of those of the first.
    let widest = width.max(cols);
    let mut scratch = backend.scratch.activations.lock(QuantizedRows::bytes(rows, widest))?;
    let quantized = QuantizedRows::new(scratch.as_mut_slice::<i32>(), rows, widest);
    let mut between = backend.scratch.intermediate.lock(rows * stride * form.bytes())?;
    with_float!(dtype, T => {
        let between = Between { start: between.as_mut_slice::<T>().as_mut_ptr(), stride };
        let x = x.map(Rows::<T>::new);
        let row = |row| {
            let (x, row) = x.of(row);
            x.row(row)
        };
        // SAFETY: nobody else uses the rows until the call returns.
        unsafe { quantized.fill(backend, row) };
        Products { backend, grouped, rows: quantized, between, out }.run();
    });
    Ok(())
}

/// The products of one call.
struct Products<'a, T> {
    backend: &'a CpuBackend,
    grouped: &'a Grouped<'a>,
    /// Those of the product that a slot is at.
    rows: QuantizedRows,
    /// `act(gate x, up x)`, of all rows.
    between: Between<T>,
    out: Sides<Output<'a>>,
}

impl<T: Float> Products<'_, T> {
    fn run(&self) {
        let passes = TwoPasses {
            first: &|items| self.gate_up(items),
            between: Some(&|slot, rows| self.quantize(slot, rows)),
            second: &|items| self.down(items),
        };
        self.backend.scratch.work.lock().run_both(self.backend, self.grouped.segments(), &passes);
    }

    /// `between = act(gate x, up x)`.
    fn gate_up(&self, Items { slot, rows, units }: Items) {
        let w = self.grouped.of(slot);
        let weights = Panels::new(&w.parts[GATE_UP], 2, w.intermediate, w.hidden);
        let scales = vector(&w.parts[GATE_UP_SCALES]);
        let bias = w.parts.get(GATE_UP_BIAS).map(vector);
        // SAFETY: the rows are as wide as the matrices' k, and nobody writes those of this slot now.
        let row_scales = unsafe { self.rows.scales(rows.clone()) };
        let block = rows.len() * PANEL;
        with_local_scratch::<i32, _>(2 * block, |sums| {
            let (gate, up) = sums.split_at_mut(block);
            for unit in units {
                for (matrix, sums) in [&mut *gate, &mut *up].into_iter().enumerate() {
                    let panel = weights.get(unit, matrix);
                    // SAFETY: as above.
                    let product = unsafe { PanelProduct::new(self.rows, rows.clone(), panel, sums) };
                    self.backend.dispatch(product);
                }
                let pair = 2 * unit * PANEL..2 * (unit + 1) * PANEL;
                self.backend.dispatch(Activate {
                    gate,
                    up,
                    row_scales,
                    scales: &scales[pair.clone()],
                    bias: bias.map(|bias| &bias[pair]),
                    activation: self.grouped.activation(slot),
                    to: self.between.skip(rows.start, unit * PANEL),
                    columns: (w.intermediate - unit * PANEL).min(PANEL),
                });
            }
        });
    }

    /// The rows of a slot for its second product.
    fn quantize(&self, slot: usize, rows: Range<usize>) {
        let width = self.grouped.of(slot).intermediate;
        for row in rows {
            // SAFETY: the first pass over this slot is over: it has written every row as wide as its expert is, and needs those in
            // whose place they are put no more. No other slot has them.
            unsafe { self.rows.quantize(self.backend, row, self.between.row(row, width)) };
        }
    }

    /// `out = down between`.
    fn down(&self, Items { slot, rows, units }: Items) {
        let w = self.grouped.of(slot);
        let weights = Panels::new(&w.parts[DOWN], 1, w.hidden, w.intermediate);
        let scales = vector(&w.parts[DOWN_SCALES]);
        let bias = w.parts.get(DOWN_BIAS).map(vector);
        let (out, first) = self.out.of(rows.start);
        // SAFETY: the rows are as wide as the matrix's k, and nobody writes them any more.
        let row_scales = unsafe { self.rows.scales(rows.clone()) };
        with_local_scratch::<f32, _>(rows.len() * PANEL, |sums| {
            for unit in units {
                let ints = bytemuck::cast_slice_mut(sums);
                let panel = weights.get(unit, 0);
                // SAFETY: as above.
                let product = unsafe { PanelProduct::new(self.rows, rows.clone(), panel, ints) };
                self.backend.dispatch(product);
                let scales = &scales[unit * PANEL..][..PANEL];
                self.backend.dispatch(Scaled { sums, row_scales, scales });
                // SAFETY: nobody else has these rows and this panel.
                unsafe { out.write(self.backend, sums, first, Cut::wide(w.hidden).range(unit), bias) };
            }
        });
    }
}

/// A packed vector.
fn vector(part: &Tensor) -> &[f32] {
    Rows::<f32>::new(part.view()).row(0)
}

/// `to[r][j] = act(gate[r][j] * scales + bias, up[r][j] * scales + bias)` for the first `columns` of one panel's columns.
struct Activate<'a, T> {
    gate: &'a [i32],
    up: &'a [i32],
    row_scales: &'a [f32],
    /// `PANEL` of gate, then `PANEL` of up.
    scales: &'a [f32],
    /// The same.
    bias: Option<&'a [f32]>,
    activation: Activation,
    to: Between<T>,
    columns: usize,
}

impl<T: Float> Kernel for Activate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let sums = self.gate.chunks_exact(PANEL).zip(self.up.chunks_exact(PANEL)).zip(self.row_scales);
        for (row, ((gate, up), &row_scale)) in sums.enumerate() {
            let row_scale = simd.splat(row_scale);
            for column in (0..self.columns).step_by(S::LANES) {
                let lanes = S::LANES.min(self.columns - column);
                // SAFETY: LANES divides PANEL, so whole vectors of sums, scales and biases exist; `to` has `columns` in each row.
                unsafe {
                    let mut gate = scaled(simd, &gate[column..], row_scale, &self.scales[column..]);
                    let mut up = scaled(simd, &up[column..], row_scale, &self.scales[PANEL + column..]);
                    if let Some(bias) = self.bias {
                        gate = simd.add(gate, simd.load(bias.as_ptr().add(column)));
                        up = simd.add(up, simd.load(bias.as_ptr().add(PANEL + column)));
                    }
                    let v = activate::<S, true>(simd, self.activation, gate, up);
                    let to = self.to.start.wrapping_add(row * self.to.stride + column);
                    if lanes == S::LANES {
                        T::store(simd, to, v);
                    } else {
                        T::store_head(simd, to, lanes, v);
                    }
                }
            }
        }
    }
}

/// The numbers that the first sums stand for.
///
/// # Safety
/// There are a whole vector of sums and scales.
#[inline(always)]
unsafe fn scaled<S: Simd>(simd: S, sums: &[i32], row_scale: S::V, scales: &[f32]) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { simd.mul(simd.mul(simd.load_ints_as_f32(sums.as_ptr()), row_scale), simd.load(scales.as_ptr())) }
}

/// Integers become the numbers they stand for, in place.
struct Scaled<'a> {
    /// `[rows, PANEL]`: integers before, f32 after. Columns beyond a narrow panel mean nothing.
    sums: &'a mut [f32],
    row_scales: &'a [f32],
    scales: &'a [f32],
}

impl Kernel for Scaled<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (sums, &row_scale) in self.sums.chunks_exact_mut(PANEL).zip(self.row_scales) {
            let row_scale = simd.splat(row_scale);
            for column in (0..PANEL).step_by(S::LANES) {
                // SAFETY: LANES divides PANEL, so whole vectors exist in both.
                unsafe {
                    let at = sums.as_mut_ptr().add(column);
                    let v = simd.mul(simd.load_ints_as_f32(at.cast()), row_scale);
                    simd.store(at, simd.mul(v, simd.load(self.scales.as_ptr().add(column))));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
