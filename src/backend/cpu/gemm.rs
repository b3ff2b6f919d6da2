//! `linear`: one weight matrix times all rows.

use super::CpuBackend;
use super::memory::{Rows, with_local_scratch};
use super::operand::{Activations, Output};
use super::panel::{self, Cut, PANEL, Panels, packed_bytes};
use super::tile::{PanelProduct, WIDE_LEN};
use super::work::{Items, Segment};
use crate::backend::{DType, HostMatrix, Matrix, View, ViewMut, check};
use crate::error::Result;

/// See [`crate::backend::Backend::pack_matrix`].
pub(super) fn pack_matrix(backend: &CpuBackend, host: &HostMatrix<'_>, dtype: DType) -> Result<Matrix> {
    check::host_matrix("matrix", host);
    let data = panel::pack(backend.pool(), &[host], Cut::even(host.n), dtype)?;
    Ok(Matrix { data, n: host.n, k: host.k })
}

/// See [`crate::backend::Backend::matrix_bytes`].
pub(super) fn matrix_bytes(_: &CpuBackend, n: usize, k: usize, dtype: DType) -> usize {
    packed_bytes(n, k, dtype)
}

/// See [`crate::backend::Backend::linear`].
pub(super) fn linear(
    backend: &CpuBackend,
    x: View<'_>,
    w: &Matrix,
    bias: Option<View<'_>>,
    out: ViewMut<'_>,
) -> Result<()> {
    check::linear(&x, w, bias.as_ref(), &out);
    let rows = x.rows();
    let bias = bias.map(|bias| Rows::<f32>::new(bias).row(0));
    if rows == 0 || w.n == 0 {
        return Ok(());
    }
    let cut = Cut::even(w.n);
    let weights = Panels::new(w.data.view(), 1, cut, w.k);
    let activations =
        Activations::new(backend, &backend.scratch.activations, x, (rows, cut.panels()), w.data.dtype())?;
    let a = activations.rows();
    let out = Output::new(out);
    let all = Segment { slot: 0, rows: 0..rows, units: cut.panels() };
    backend.scratch.work.lock().run(backend, std::iter::once(all), &|Items { rows, units, .. }| {
        with_local_scratch::<f32, _>(rows.len() * PANEL + WIDE_LEN, |scratch| {
            let (wide, sums) = scratch.split_at_mut(WIDE_LEN);
            let a = a.skip(rows.start);
            for unit in units {
                let panel = weights.get(unit, 0);
                // SAFETY: `a` is `x` prepared for weights of this type, `x` has the matrix's k, and the rows are in range.
                backend.dispatch(unsafe { PanelProduct::new(a, rows.len(), panel, sums, wide) });
                // SAFETY: nobody else has these rows and this panel.
                unsafe { out.write(backend, sums, rows.start, cut.range(unit), bias) };
            }
        });
    });
    Ok(())
}
