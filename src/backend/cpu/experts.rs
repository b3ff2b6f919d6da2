//! `experts`: rows grouped by slot through the gated MLP of their slot, each weight read once per call.
//!
//! Gate and up are packed as alternating panels, so one task computes both halves of 48 intermediate columns and applies the
//! activation while they are in the cache. The panels of all slots form one list: threads share bytes, not experts, and a step
//! with one row per expert is as well balanced as one large expert.

use half::bf16;

use super::memory::{self, Element, Rows, RowsMut, with_local_scratch};
use super::operand::{Activations, Form, Output, row_stride};
use super::panel::{self, PANEL, Panels, packed_bytes, padded_k, panels};
use super::simd::{Float, Kernel, Simd, sigmoid, sigmoid_alike};
use super::tile::{self, PanelProduct, WIDE_LEN};
use super::work::{Items, Segment};
use super::{CpuBackend, int8};
use crate::backend::{DType, ExpertsArgs, HostMlp, HostMlpBias, Mlp, Tensor, View, ViewMut, check};
use crate::error::Result;
use crate::spec::Activation;

/// Parts of a packed [`Mlp`], in order; the two biases are there together or not at all.
const GATE_UP: usize = 0;
const DOWN: usize = 1;
const GATE_UP_BIAS: usize = 2;
const DOWN_BIAS: usize = 3;

/// See [`crate::backend::Backend::pack_mlp`]. A panel of gate is followed by the same one of up; the bias of both is
/// laid out alike, [`PANEL`] of each in turn.
pub(super) fn pack_mlp(backend: &CpuBackend, host: &HostMlp<'_>, dtype: DType) -> Result<Mlp> {
    check::pack_mlp(host);
    let biases = host.bias.as_ref().map(|bias| pack_biases(host, bias)).transpose()?.unwrap_or_default();
    if dtype == DType::I8 {
        return int8::pack_mlp(backend, host, biases);
    }
    let (intermediate, hidden) = (host.gate.n, host.gate.k);
    let mut parts = vec![
        panel::pack(backend.pool(), &[&host.gate, &host.up], dtype)?,
        panel::pack(backend.pool(), &[&host.down], dtype)?,
    ];
    parts.extend(biases);
    Ok(Mlp { parts, hidden, intermediate })
}

/// The bias of gate and up, laid out as their panels, and that of down.
fn pack_biases(host: &HostMlp<'_>, bias: &HostMlpBias) -> Result<Vec<Tensor>> {
    let HostMlpBias { gate, up, down } = bias;
    let mut both = memory::tensor(DType::F32, 1, 2 * panels(host.gate.n) * PANEL)?;
    let mut to = RowsMut::<f32>::new(both.view_mut());
    let pairs = gate.chunks(PANEL).zip(up.chunks(PANEL));
    for ((gate, up), to) in pairs.zip(to.row_mut(0).chunks_exact_mut(2 * PANEL)) {
        to[..gate.len()].copy_from_slice(gate);
        to[PANEL..][..up.len()].copy_from_slice(up);
    }
    let mut out = memory::tensor(DType::F32, 1, host.gate.k)?;
    RowsMut::<f32>::new(out.view_mut()).row_mut(0).copy_from_slice(down);
    Ok(vec![both, out])
}

/// See [`crate::backend::Backend::mlp_bytes`].
pub(super) fn mlp_bytes(
    _: &CpuBackend,
    hidden: usize,
    intermediate: usize,
    bias: bool,
    dtype: DType,
) -> usize {
    let gate_up = packed_bytes(intermediate, hidden, dtype).saturating_mul(2);
    let down = packed_bytes(hidden, intermediate, dtype);
    let biases =
        if bias { (2 * panels(intermediate) * PANEL).saturating_add(hidden).saturating_mul(4) } else { 0 };
    let scales = if dtype == DType::I8 { int8::scale_bytes(hidden, intermediate) } else { 0 };
    gate_up.saturating_add(down).saturating_add(biases).saturating_add(scales)
}

/// See [`crate::backend::Backend::experts`].
pub(super) fn experts(backend: &CpuBackend, args: ExpertsArgs<'_>, out: ViewMut<'_>) -> Result<()> {
    check::experts(&args, &out);
    let ExpertsArgs { rows, offsets, slots, activation } = args;
    let of = |slot: usize| slots[slot].as_ref();
    Grouped { offsets, mlp: &of, activation }.run(backend, rows, out)
}

/// See [`crate::backend::Backend::mlp`].
pub(super) fn mlp(
    backend: &CpuBackend,
    x: View<'_>,
    w: &Mlp,
    activation: Activation,
    out: ViewMut<'_>,
) -> Result<()> {
    check::mlp(&x, w, &out);
    Grouped { offsets: &[0, x.rows()], mlp: &|_| Some(w), activation }.run(backend, x, out)
}

/// Which rows go through which MLP.
pub(super) struct Grouped<'a> {
    offsets: &'a [usize],
    mlp: &'a (dyn Fn(usize) -> Option<&'a Mlp> + Sync),
    pub(super) activation: Activation,
}

impl Grouped<'_> {
    fn run(&self, backend: &CpuBackend, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
        let (rows, dtype) = (x.rows(), x.dtype());
        // All slots have weights of one type: checked.
        let Some((_, _, first)) = self.used().next() else { return Ok(()) };
        let width = self.used().map(|(_, _, w)| w.intermediate).fold(first.intermediate, usize::max);
        if first.parts[GATE_UP].dtype() == DType::I8 {
            return int8::experts(backend, self, width, x, out);
        }
        let tallest = self.used().map(|(_, rows, _)| rows.len()).fold(0, usize::max);
        let activations =
            Activations::new(backend, x, (tallest, 2 * panels(width)), first.parts[GATE_UP].dtype())?;
        let form = Form::of(backend, dtype);
        let stride = row_stride(width, form);
        let mut buffer = backend.scratch.intermediate.lock(rows * stride * form.bytes())?;
        match form {
            Form::F32 => {
                let between = Between { start: buffer.as_mut_slice::<f32>().as_mut_ptr(), stride };
                let round = dtype == DType::Bf16;
                self.gate_up(backend, activations.rows(), between, round);
                let a = tile::Rows::F32 { start: between.start, stride };
                self.down(backend, a, Output::new(out));
            }
            Form::Pairs => {
                let between = Between { start: buffer.as_mut_slice::<bf16>().as_mut_ptr(), stride };
                self.gate_up(backend, activations.rows(), between, false);
                let a = tile::Rows::Pairs { start: between.start, stride };
                self.down(backend, a, Output::new(out));
            }
        }
        Ok(())
    }

    /// Slots that have rows, with their MLPs.
    fn used(&self) -> impl Iterator<Item = (usize, std::ops::Range<usize>, &Mlp)> + Clone {
        self.offsets
            .windows(2)
            .enumerate()
            .filter(|(_, w)| w[0] != w[1])
            .map(|(slot, w)| (slot, w[0]..w[1], self.of(slot)))
    }

    /// The MLP of a slot that has rows.
    pub(super) fn of(&self, slot: usize) -> &Mlp {
        (self.mlp)(slot).unwrap_or_else(|| panic!("slot {slot} is empty and has rows"))
    }

    /// Whose row this is.
    pub(super) fn slot_of(&self, row: usize) -> usize {
        self.offsets.partition_point(|&start| start <= row) - 1
    }

    /// The segments of one pass.
    pub(super) fn segments(
        &self,
        units: impl Fn(&Mlp) -> usize + Clone,
    ) -> impl Iterator<Item = Segment> + Clone {
        self.used().map(move |(slot, rows, w)| Segment { slot, rows, units: units(w) })
    }

    /// `between = act(gate x, up x)`.
    fn gate_up<T: Float>(&self, backend: &CpuBackend, a: tile::Rows, between: Between<T>, round: bool) {
        let mut work = backend.scratch.work.lock();
        work.plan(backend, self.segments(|w| panels(w.intermediate)));
        work.run(backend, &|Items { slot, rows, units }| {
            let w = self.of(slot);
            let weights = Panels::new(w.parts[GATE_UP].view(), 2, w.intermediate, w.hidden);
            let bias = w.parts.get(GATE_UP_BIAS).map(|b| Rows::<f32>::new(b.view()).row(0));
            let columns = padded_k(w.intermediate, w.parts[DOWN].dtype());
            let a = a.skip(rows.start);
            let block = rows.len() * PANEL;
            with_local_scratch::<f32, _>(2 * block + WIDE_LEN, |scratch| {
                let (wide, sums) = scratch.split_at_mut(WIDE_LEN);
                let (gate, up) = sums.split_at_mut(block);
                for unit in units {
                    for (matrix, sums) in [&mut *gate, &mut *up].into_iter().enumerate() {
                        let panel = weights.get(unit, matrix);
                        // SAFETY: `a` are the rows of the call prepared for weights of this type, as wide as the matrices' k.
                        backend.dispatch(unsafe { PanelProduct::new(a, rows.len(), panel, sums, wide) });
                    }
                    backend.dispatch(Activate {
                        gate,
                        up,
                        bias: bias.map(|b| &b[2 * unit * PANEL..][..2 * PANEL]),
                        activation: self.activation,
                        round,
                        to: between.skip(rows.start, unit * PANEL),
                        columns: (columns - unit * PANEL).min(PANEL),
                    });
                }
            });
        });
    }

    /// `out = down between`.
    fn down(&self, backend: &CpuBackend, a: tile::Rows, out: Output<'_>) {
        let mut work = backend.scratch.work.lock();
        work.plan(backend, self.segments(|w| panels(w.hidden)));
        work.run(backend, &|Items { slot, rows, units }| {
            let w = self.of(slot);
            let weights = Panels::new(w.parts[DOWN].view(), 1, w.hidden, w.intermediate);
            let bias = w.parts.get(DOWN_BIAS).map(|b| Rows::<f32>::new(b.view()).row(0));
            let a = a.skip(rows.start);
            with_local_scratch::<f32, _>(rows.len() * PANEL + WIDE_LEN, |scratch| {
                let (wide, sums) = scratch.split_at_mut(WIDE_LEN);
                for unit in units {
                    let panel = weights.get(unit, 0);
                    // SAFETY: the first pass has written these rows, as wide as the matrix's k, zero padding included.
                    backend.dispatch(unsafe { PanelProduct::new(a, rows.len(), panel, sums, wide) });
                    // SAFETY: nobody else has these rows and this panel.
                    unsafe { out.write(backend, sums, rows.start, unit, bias) };
                }
            });
        });
    }
}

/// The buffer between the two matrices, written by many tasks.
pub(super) struct Between<T> {
    pub(super) start: *mut T,
    pub(super) stride: usize,
}

impl<T> Clone for Between<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Between<T> {}

// SAFETY: a plain address; tasks write disjoint blocks of rows and columns behind it.
unsafe impl<T: Element> Sync for Between<T> {}

impl<T> Between<T> {
    /// The same buffer from another element on.
    pub(super) fn skip(self, row: usize, column: usize) -> Self {
        Between { start: self.start.wrapping_add(row * self.stride + column), ..self }
    }

    /// The first elements of a row.
    ///
    /// # Safety
    /// They are there for `'a`, written, and nobody writes them meanwhile.
    pub(super) unsafe fn row<'a>(self, row: usize, width: usize) -> &'a [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start.add(row * self.stride), width) }
    }
}

/// `to[r][j] = act(gate[r][j] + bias, up[r][j] + bias)` for the first `columns` of one panel's columns.
struct Activate<'a, T> {
    gate: &'a [f32],
    up: &'a [f32],
    /// `PANEL` of gate, then `PANEL` of up.
    bias: Option<&'a [f32]>,
    activation: Activation,
    /// Round to bf16, for a buffer that holds widened bf16.
    round: bool,
    to: Between<T>,
    columns: usize,
}

impl<T: Float> Kernel for Activate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (row, (gate, up)) in self.gate.chunks_exact(PANEL).zip(self.up.chunks_exact(PANEL)).enumerate() {
            for column in (0..self.columns).step_by(S::LANES) {
                let lanes = S::LANES.min(self.columns - column);
                // SAFETY: LANES divides PANEL, so whole vectors of sums and biases exist; `to` has `columns` in each row.
                unsafe {
                    let mut gate = simd.load(gate.as_ptr().add(column));
                    let mut up = simd.load(up.as_ptr().add(column));
                    if let Some(bias) = self.bias {
                        gate = simd.add(gate, simd.load(bias.as_ptr().add(column)));
                        up = simd.add(up, simd.load(bias.as_ptr().add(PANEL + column)));
                    }
                    let mut v = activate::<S, false>(simd, self.activation, gate, up);
                    if self.round {
                        v = simd.round_to_bf16(v);
                    }
                    let to = self.to.start.add(row * self.to.stride + column);
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

/// See [`Activation`]. Zero for zeros, so padding stays zero. `ALIKE`: with the same bits on every instruction set.
#[inline(always)]
pub(super) fn activate<S: Simd, const ALIKE: bool>(
    simd: S,
    activation: Activation,
    gate: S::V,
    up: S::V,
) -> S::V {
    match activation {
        Activation::SiluMul => simd.mul(simd.mul(gate, sigmoid_as::<S, ALIKE>(simd, gate)), up),
        Activation::ClampedSwiglu { limit, alpha } => {
            let gate = simd.min(simd.splat(limit), gate);
            let up = simd.max(simd.splat(-limit), simd.min(simd.splat(limit), up));
            let glu = simd.mul(gate, sigmoid_as::<S, ALIKE>(simd, simd.mul(gate, simd.splat(alpha))));
            simd.mul(glu, simd.add(up, simd.splat(1.0)))
        }
    }
}

#[inline(always)]
fn sigmoid_as<S: Simd, const ALIKE: bool>(simd: S, x: S::V) -> S::V {
    if ALIKE { sigmoid_alike(simd, x) } else { sigmoid(simd, x) }
}
