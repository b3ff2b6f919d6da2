//! `experts` and `mlp`: rows grouped by slot through the gated MLP of their slot, and all rows through a shared one, each weight read once
//! per call.
//!
//! Gate and up are packed as alternating panels, so one task computes both halves of 48 intermediate columns and applies the
//! activation while they are in the cache. The panels of all MLPs form one list, and those of the second matrices another: threads share
//! bytes, not experts, and a step with one row per expert is as well balanced as one large expert.

mod between;
mod pack;
mod sides;

use std::ops::Range;

use half::bf16;

use super::memory::{Rows, with_local_scratch};
use super::operand::{Activations, Form, Output, row_stride};
use super::panel::{Cut, PANEL, Panels, padded_k, panels};
use super::simd::Float;
use super::tile::{self, PanelProduct, WIDE_LEN};
use super::work::{Items, Segment, TwoPasses};
use super::{CpuBackend, int8};
use crate::backend::{DType, ExpertsArgs, Mlp, SharedArgs, View, ViewMut, check};
use crate::error::Result;
use crate::spec::Activation;
use between::Activate;
pub(super) use between::{Between, activate};
use pack::{DOWN, DOWN_BIAS, GATE_UP, GATE_UP_BIAS};
pub(super) use pack::{mlp_bytes, pack_mlp};
pub(super) use sides::Sides;

/// See [`crate::backend::Backend::experts`].
pub(super) fn experts(backend: &CpuBackend, args: ExpertsArgs<'_>, out: ViewMut<'_>) -> Result<()> {
    check::experts(&args, &out);
    let border = args.rows.rows();
    let x = Sides { routed: Some(args.rows), shared: None, border };
    let out = Sides { routed: Some(out), shared: None, border };
    Grouped { routed: Some(args), shared: None }.run(backend, x, out)
}

/// See [`crate::backend::Backend::mlp`].
pub(super) fn mlp(
    backend: &CpuBackend,
    rows: View<'_>,
    mlp: &Mlp,
    activation: Activation,
    out: ViewMut<'_>,
) -> Result<()> {
    check::mlp(&rows, mlp, &out);
    let x = Sides { routed: None, shared: Some(rows), border: 0 };
    let out = Sides { routed: None, shared: Some(out), border: 0 };
    Grouped { routed: None, shared: Some(SharedArgs { rows, mlp, activation }) }.run(backend, x, out)
}

/// See [`crate::backend::Backend::experts_and_shared`].
pub(super) fn experts_and_shared(
    backend: &CpuBackend,
    (routed, out): (ExpertsArgs<'_>, ViewMut<'_>),
    (shared, shared_out): (SharedArgs<'_>, ViewMut<'_>),
) -> Result<()> {
    check::experts_and_shared((&routed, &out), (&shared, &shared_out));
    let border = routed.rows.rows();
    let x = Sides { routed: Some(routed.rows), shared: Some(shared.rows), border };
    let out = Sides { routed: Some(out), shared: Some(shared_out), border };
    Grouped { routed: Some(routed), shared: Some(shared) }.run(backend, x, out)
}

/// Which rows go through which MLP: the routed ones by their slots; behind them, in a slot of its own, those of the shared one.
pub(super) struct Grouped<'a> {
    routed: Option<ExpertsArgs<'a>>,
    shared: Option<SharedArgs<'a>>,
}

impl Grouped<'_> {
    fn run(&self, backend: &CpuBackend, x: Sides<View<'_>>, out: Sides<ViewMut<'_>>) -> Result<()> {
        let (mut first, mut width, mut tallest) = (None, 0, 0);
        for (slot, rows, w) in self.used() {
            first = first.or(Some(w));
            width = w.intermediate.max(width);
            if !self.is_shared(slot) {
                tallest = rows.len().max(tallest);
            }
        }
        // All have weights of one type, and rows of one: checked.
        let Some(first) = first else { return Ok(()) };
        let (weights, dtype) = (first.parts[GATE_UP].dtype(), x.any().expect("rows that are used").dtype());
        let rows = x.border + x.shared.as_ref().map_or(0, View::rows);
        if weights == DType::I8 {
            return int8::experts(backend, self, (rows, width), x, out);
        }
        let scratch = &backend.scratch;
        let both = 2 * panels(width);
        let routed =
            x.routed.map(|x| Activations::new(backend, &scratch.activations, x, (tallest, both), weights));
        let shared =
            x.shared.map(|x| Activations::new(backend, &scratch.shared, x, (x.rows(), both), weights));
        let activations =
            Sides { routed: routed.transpose()?, shared: shared.transpose()?, border: x.border };
        let x = Sides {
            routed: activations.routed.as_ref().map(Activations::rows),
            shared: activations.shared.as_ref().map(Activations::rows),
            border: activations.border,
        };
        let out = out.map(Output::new);
        let form = Form::of(backend, dtype);
        let stride = row_stride(width, form);
        let mut buffer = scratch.intermediate.lock(rows * stride * form.bytes())?;
        match form {
            Form::F32 => {
                let between = Between { start: buffer.as_mut_slice::<f32>().as_mut_ptr(), stride };
                let second = tile::Rows::F32 { start: between.start, stride };
                let round = dtype == DType::Bf16;
                Products { backend, grouped: self, x, between, round, second, out }.run();
            }
            Form::Pairs => {
                let between = Between { start: buffer.as_mut_slice::<bf16>().as_mut_ptr(), stride };
                let second = tile::Rows::Pairs { start: between.start, stride };
                Products { backend, grouped: self, x, between, round: false, second, out }.run();
            }
        }
        Ok(())
    }

    /// MLPs that have rows, with their slots.
    fn used(&self) -> impl Iterator<Item = (usize, Range<usize>, &Mlp)> + Clone {
        let routed = self.routed.iter().flat_map(|args| args.offsets.windows(2)).enumerate();
        let routed = routed.filter(|(_, w)| w[0] != w[1]).map(|(slot, w)| (slot, w[0]..w[1], self.of(slot)));
        let border = self.border();
        let shared = self.shared.iter().filter(|shared| shared.rows.rows() > 0);
        let shared = shared.map(move |args| (self.slots(), border..border + args.rows.rows(), args.mlp));
        routed.chain(shared)
    }

    /// Slots of routed rows: the number of the shared expert's.
    fn slots(&self) -> usize {
        self.routed.as_ref().map_or(0, |args| args.slots.len())
    }

    /// Routed rows.
    fn border(&self) -> usize {
        self.routed.as_ref().map_or(0, |args| args.rows.rows())
    }

    fn is_shared(&self, slot: usize) -> bool {
        slot == self.slots()
    }

    /// The MLP of a slot that has rows.
    pub(super) fn of(&self, slot: usize) -> &Mlp {
        match (&self.routed, &self.shared) {
            (_, Some(shared)) if self.is_shared(slot) => shared.mlp,
            (Some(routed), _) => {
                routed.slots[slot].as_ref().unwrap_or_else(|| panic!("slot {slot} is empty and has rows"))
            }
            _ => panic!("slot {slot} of none"),
        }
    }

    /// What a slot does between its matrices.
    pub(super) fn activation(&self, slot: usize) -> Activation {
        match (&self.routed, &self.shared) {
            (_, Some(shared)) if self.is_shared(slot) => shared.activation,
            (Some(routed), _) => routed.activation,
            _ => panic!("slot {slot} of none"),
        }
    }

    /// The segments of both passes: panels of gate and up, then those of down.
    pub(super) fn segments(&self) -> impl Iterator<Item = (Segment, usize)> + Clone {
        self.used()
            .map(|(slot, rows, w)| (Segment { slot, rows, units: panels(w.intermediate) }, panels(w.hidden)))
    }
}

/// The products of one call with weights that are not quantised.
struct Products<'a, T> {
    backend: &'a CpuBackend,
    grouped: &'a Grouped<'a>,
    x: Sides<tile::Rows>,
    /// `act(gate x, up x)`, of all rows.
    between: Between<T>,
    /// Round them to bf16, in a buffer that holds widened bf16.
    round: bool,
    /// The same rows, for the second product.
    second: tile::Rows,
    out: Sides<Output<'a>>,
}

impl<T: Float> Products<'_, T> {
    fn run(&self) {
        let passes = TwoPasses {
            first: &|items| self.gate_up(items),
            between: None,
            second: &|items| self.down(items),
        };
        self.backend.scratch.work.lock().run_both(self.backend, self.grouped.segments(), &passes);
    }

    /// `between = act(gate x, up x)`.
    fn gate_up(&self, Items { slot, rows, units }: Items) {
        let w = self.grouped.of(slot);
        let weights = Panels::new(w.parts[GATE_UP].view(), 2, Cut::wide(w.intermediate), w.hidden);
        let bias = w.parts.get(GATE_UP_BIAS).map(|b| Rows::<f32>::new(b.view()).row(0));
        let columns = padded_k(w.intermediate, w.parts[DOWN].dtype());
        let (a, first) = self.x.of(rows.start);
        let a = a.skip(first);
        let block = rows.len() * PANEL;
        with_local_scratch::<f32, _>(2 * block + WIDE_LEN, |scratch| {
            let (wide, sums) = scratch.split_at_mut(WIDE_LEN);
            let (gate, up) = sums.split_at_mut(block);
            for unit in units {
                for (matrix, sums) in [&mut *gate, &mut *up].into_iter().enumerate() {
                    let panel = weights.get(unit, matrix);
                    // SAFETY: `a` are the rows of the call prepared for weights of this type, as wide as the matrices' k.
                    self.backend.dispatch(unsafe { PanelProduct::new(a, rows.len(), panel, sums, wide) });
                }
                self.backend.dispatch(Activate {
                    gate,
                    up,
                    bias: bias.map(|b| &b[2 * unit * PANEL..][..2 * PANEL]),
                    activation: self.grouped.activation(slot),
                    round: self.round,
                    to: self.between.skip(rows.start, unit * PANEL),
                    columns: (columns - unit * PANEL).min(PANEL),
                });
            }
        });
    }

    /// `out = down between`.
    fn down(&self, Items { slot, rows, units }: Items) {
        let w = self.grouped.of(slot);
        let cut = Cut::wide(w.hidden);
        let weights = Panels::new(w.parts[DOWN].view(), 1, cut, w.intermediate);
        let bias = w.parts.get(DOWN_BIAS).map(|b| Rows::<f32>::new(b.view()).row(0));
        let a = self.second.skip(rows.start);
        let (out, first) = self.out.of(rows.start);
        with_local_scratch::<f32, _>(rows.len() * PANEL + WIDE_LEN, |scratch| {
            let (wide, sums) = scratch.split_at_mut(WIDE_LEN);
            for unit in units {
                let panel = weights.get(unit, 0);
                // SAFETY: the first pass has written these rows, as wide as the matrix's k, zero padding included.
                self.backend.dispatch(unsafe { PanelProduct::new(a, rows.len(), panel, sums, wide) });
                // SAFETY: nobody else has these rows and this panel.
                unsafe { out.write(self.backend, sums, first, cut.range(unit), bias) };
            }
        });
    }
}
