//! How weights in 8 bits lie in memory: in panels as those of other types ([`crate::backend::cpu::panel`]), `[k / 4][columns][4]`, the
//! quads that VNNI takes. Each column is quantised as a row of activations is.

use super::rows::Quantize;
use crate::backend::cpu::CpuBackend;
use crate::backend::cpu::memory::{self, Rows, RowsMut, with_local_scratch};
use crate::backend::cpu::panel::{Cut, PANEL, packed_bytes, padded_k, panels};
use crate::backend::{DType, HostData, HostMatrix, Tensor};
use crate::error::Result;

/// One packed panel.
#[derive(Clone, Copy)]
pub struct Panel<'a> {
    /// `[k / 4][columns][4]`
    pub weights: &'a [i8],
    /// [`PANEL`], or fewer whole vectors.
    pub columns: usize,
}

/// The panels of some matrices of one shape.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    weights: &'a [i8],
    /// Columns of one matrix.
    n: usize,
    /// k as packed.
    depth: usize,
    matrices: usize,
}

impl<'a> Panels<'a> {
    /// A tensor made by [`pack`] of so many matrices `[n, k]`.
    ///
    /// # Panics
    /// When it is not: kernels rely on it.
    pub fn new(packed: &'a Tensor, matrices: usize, n: usize, k: usize) -> Self {
        let weights = Rows::<i8>::new(packed.view()).all();
        let expected = matrices * packed_bytes(n, k, DType::I8);
        let found = weights.len();
        assert!(found == expected, "{found} packed weights of {matrices} x [{n}, {k}], expected {expected}");
        Panels { weights, n, depth: padded_k(k, DType::I8), matrices }
    }

    /// One panel of one of the matrices.
    pub fn get(&self, panel: usize, matrix: usize) -> Panel<'a> {
        let weights = &self.weights[Cut::wide(self.n).place(self.depth, self.matrices, panel, matrix)];
        Panel { weights, columns: Cut::wide(self.n).columns(panel) }
    }
}

/// Packs matrices of one shape into a tensor of one row, panel 0 of each, panel 1 of each, and so on, and their scales into another,
/// [`PANEL`] for every panel.
///
/// # Errors
/// [`crate::Error::Memory`] when a tensor cannot be allocated.
pub fn pack(backend: &CpuBackend, matrices: &[&HostMatrix<'_>]) -> Result<(Tensor, Tensor)> {
    let (n, k, count) = (matrices[0].n, matrices[0].k, matrices.len());
    let bytes = packed_bytes(n, k, DType::I8).saturating_mul(count);
    let mut packed = memory::lasting_tensor(DType::I8, 1, bytes)?;
    let mut scales = memory::tensor(DType::F32, 1, panels(n) * count * PANEL)?;
    let (to, scales_to) = (RowsMut::<i8>::new(packed.view_mut()), RowsMut::<f32>::new(scales.view_mut()));
    let (cut, depth) = (Cut::wide(n), padded_k(k, DType::I8));
    backend.pool().run(panels(n) * count, &|task| {
        let (panel, matrix) = (task / count, task % count);
        let (first, width) = (panel * PANEL, cut.columns(panel));
        let filled = PANEL.min(n - first);
        // SAFETY: a panel and its scales are written by one task.
        let (to, scales) = unsafe {
            let scales = task * PANEL..task * PANEL + filled;
            (to.part(0, cut.place(depth, count, panel, matrix)), scales_to.part(0, scales))
        };
        with_local_scratch::<i8, _>(k.next_multiple_of(64), |column| {
            for (number, scale) in scales.iter_mut().enumerate() {
                let range = (first + number) * k..(first + number + 1) * k;
                *scale = match &matrices[matrix].data {
                    HostData::F32(data) => backend.dispatch(Quantize { from: &data[range], to: column }).0,
                    HostData::Bf16(data) => backend.dispatch(Quantize { from: &data[range], to: column }).0,
                    HostData::Quantized(data) => panic!("{:?} weights packed as I8", data.dtype()),
                };
                // Left over from earlier columns.
                column[k..].fill(0);
                let quads = column[..depth].chunks_exact(4);
                for (quad, to) in quads.zip(to.chunks_exact_mut(4).skip(number).step_by(width)) {
                    to.copy_from_slice(quad);
                }
            }
        });
    });
    Ok((packed, scales))
}
