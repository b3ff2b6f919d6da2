//! The up-projection of multi-head latent attention, packed: `W_k` twice, once for each form, and `W_v` once.

use half::bf16;

use super::CpuBackend;
use super::kv::{padded, padded_latent};
use super::memory::{self, RowsMut};
use super::rows::with_float;
use super::simd::Float;
use crate::backend::{DType, HostData, HostMatrix, MlaWeights, check};
use crate::error::Result;

/// Columns of one panel of a head's matrix: two of the largest registers, so that a panel stays in the first-level cache.
pub const COLUMNS: usize = 32;

/// Parts of [`MlaWeights`]. `W_k` as rows, `[heads * padded nope, padded latent]`, to expand with.
pub const KEY_ROWS: usize = 0;
/// `W_k` as panels over nope, a row of the tensor per head, to absorb queries with.
pub const KEY_PANELS: usize = 1;
/// `W_v` as panels over the latent, a row of the tensor per head, for both forms.
pub const VALUE_PANELS: usize = 2;

/// Elements of a matrix of `k` rows, padding included, in panels of [`COLUMNS`].
fn panel_elements(k: usize, columns: usize) -> usize {
    k.saturating_mul(columns.next_multiple_of(COLUMNS))
}

/// Place of element (k, column) in panels of [`COLUMNS`] over `depth` k, padding included, `T` by as many k as fit into 32 bits.
fn place<T>(k: usize, column: usize, depth: usize) -> usize {
    let group = size_of::<u32>() / size_of::<T>();
    let panel = column / COLUMNS * depth * COLUMNS;
    panel + (k / group * COLUMNS + column % COLUMNS) * group + k % group
}

/// See [`crate::backend::Backend::pack_mla`].
pub fn pack_mla(
    backend: &CpuBackend,
    kv_b: &HostMatrix<'_>,
    heads: usize,
    nope_dim: usize,
    v_dim: usize,
    dtype: DType,
) -> Result<MlaWeights> {
    check::pack_mla(kv_b, heads, nope_dim, v_dim);
    let latent = kv_b.k;
    let (nope_depth, latent_depth) = (padded(nope_dim), padded_latent(latent));
    let mut parts = vec![
        memory::lasting_tensor(dtype, heads.saturating_mul(nope_depth), latent_depth)?,
        memory::lasting_tensor(dtype, heads, panel_elements(nope_depth, latent))?,
        memory::lasting_tensor(dtype, heads, panel_elements(latent_depth, v_dim))?,
    ];
    with_float!(dtype, T => {
        let [key_rows, key_panels, value_panels] = &mut parts[..] else { unreachable!("three parts") };
        let key_rows = RowsMut::<T>::new(key_rows.view_mut());
        let key_panels = RowsMut::<T>::new(key_panels.view_mut());
        let value_panels = RowsMut::<T>::new(value_panels.view_mut());
        backend.pool().run(heads, &|head| {
            let element = |j: usize, l: usize| {
                let at = (head * (nope_dim + v_dim) + j) * latent + l;
                match &kv_b.data {
                    HostData::F32(data) => T::from_f32(data[at]),
                    HostData::Bf16(data) => T::from_f32(bf16::to_f32(data[at])),
                    HostData::Quantized(_) => panic!("only experts are quantised"),
                }
            };
            // SAFETY: rows of these tensors belong to one head, and a head is one task.
            let (key_panels, value_panels) = unsafe {
                (key_panels.part(head, 0..key_panels.cols()), value_panels.part(head, 0..value_panels.cols()))
            };
            for d in 0..nope_dim {
                // SAFETY: as above.
                let row = unsafe { key_rows.part(head * nope_depth + d, 0..latent) };
                for (l, x) in row.iter_mut().enumerate() {
                    *x = element(d, l);
                    key_panels[place::<T>(d, l, nope_depth)] = *x;
                }
            }
            for d in 0..v_dim {
                (0..latent).for_each(|l| value_panels[place::<T>(l, d, latent_depth)] = element(nope_dim + d, l));
            }
        });
    });
    Ok(MlaWeights { parts, heads, latent, nope_dim, v_dim })
}

/// See [`crate::backend::Backend::mla_bytes`].
pub fn mla_bytes(
    _: &CpuBackend,
    heads: usize,
    nope_dim: usize,
    v_dim: usize,
    latent: usize,
    dtype: DType,
) -> usize {
    let (nope_depth, latent_depth) = (padded(nope_dim), padded_latent(latent));
    let key_rows = nope_depth.saturating_mul(latent_depth);
    let elements = key_rows + panel_elements(nope_depth, latent) + panel_elements(latent_depth, v_dim);
    heads.saturating_mul(elements).saturating_mul(dtype.bytes())
}
