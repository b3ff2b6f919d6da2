//! How an MLP lies in memory: gate and up as alternating panels, so that what is computed together follows each other.

use crate::backend::cpu::memory::{self, RowsMut};
use crate::backend::cpu::panel::{self, Cut, PANEL, packed_bytes, panels};
use crate::backend::cpu::{CpuBackend, int8};
use crate::backend::{DType, HostMlp, HostMlpBias, Mlp, Tensor, check};
use crate::error::Result;

/// Parts of a packed [`Mlp`], in order; the two biases are there together or not at all.
pub const GATE_UP: usize = 0;
pub const DOWN: usize = 1;
pub const GATE_UP_BIAS: usize = 2;
pub const DOWN_BIAS: usize = 3;

/// See [`crate::backend::Backend::pack_mlp`]. A panel of gate is followed by the same one of up; the bias of both is
/// laid out alike, [`PANEL`] of each in turn.
pub(in crate::backend::cpu) fn pack_mlp(
    backend: &CpuBackend,
    host: &HostMlp<'_>,
    dtype: DType,
) -> Result<Mlp> {
    check::pack_mlp(host);
    let biases = host.bias.as_ref().map(|bias| pack_biases(host, bias)).transpose()?.unwrap_or_default();
    if dtype == DType::I8 {
        return int8::pack_mlp(backend, host, biases);
    }
    let (intermediate, hidden) = (host.gate.n, host.gate.k);
    let mut parts = vec![
        panel::pack(backend.pool(), &[&host.gate, &host.up], Cut::wide(intermediate), dtype)?,
        panel::pack(backend.pool(), &[&host.down], Cut::wide(hidden), dtype)?,
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
pub(in crate::backend::cpu) fn mlp_bytes(
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
