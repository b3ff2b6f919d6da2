//! How weight matrices lie in memory. A matrix `[n, k]` is cut into panels of [`PANEL`] output columns; a panel is
//! contiguous and k-major, so that a kernel reads it once, front to back:
//! * f32: `[k][PANEL]`;
//! * bf16: `[k / 2][PANEL][2]`, the pairs that AVX-512's dot product takes; an odd k is padded with a zero.
//!
//! Missing columns of the last panel are zero. All instruction sets share the layout, so a packed expert can move
//! between ranks that run different ones.

use half::bf16;

use super::memory::{self, Element, Rows, RowsMut};
use super::pool::Pool;
use crate::backend::{DType, HostData, HostMatrix, Tensor, View};
use crate::error::Result;

/// Output columns of one panel. 48 is three registers of AVX-512 or six of AVX2: with 8 rows of the one (24 accumulators of
/// 32 registers) and 6 rows x a third of the panel of the other (12 of 16) a tile does at least two multiplications
/// per load, and one row alone still has enough independent sums to hide the latency of a multiplication.
pub const PANEL: usize = 48;

/// Panels of `n` columns.
pub fn panels(n: usize) -> usize {
    n.div_ceil(PANEL)
}

/// `k` as packed: whole pairs for bf16.
pub fn padded_k(k: usize, dtype: DType) -> usize {
    match dtype {
        DType::Bf16 => k.next_multiple_of(2),
        DType::F32 | DType::I32 => k,
    }
}

/// Bytes of `[n, k]` as panels; saturates, as nothing of that size can be allocated.
pub fn packed_bytes(panels: usize, k: usize, dtype: DType) -> usize {
    panels.saturating_mul(PANEL).saturating_mul(padded_k(k, dtype)).saturating_mul(dtype.bytes())
}

/// One packed panel.
#[derive(Clone, Copy)]
pub enum Panel<'a> {
    /// `[k][PANEL]`
    F32(&'a [f32]),
    /// `[k / 2][PANEL][2]`
    Bf16(&'a [bf16]),
}

/// The panels of a packed matrix.
#[derive(Clone, Copy)]
pub enum Panels<'a> {
    /// A row of each is one [`Panel::F32`].
    F32(Rows<'a, f32>),
    /// A row of each is one [`Panel::Bf16`].
    Bf16(Rows<'a, bf16>),
}

impl<'a> Panels<'a> {
    /// A tensor made by [`pack`].
    ///
    /// # Panics
    /// When it is not `panels` panels of `k`: kernels rely on it.
    pub fn new(packed: View<'a>, panels: usize, k: usize) -> Self {
        let (rows, cols) = (packed.rows(), packed.cols());
        let expected = (panels, padded_k(k, packed.dtype()) * PANEL);
        assert!((rows, cols) == expected, "weights packed as [{rows}, {cols}], expected {expected:?}");
        match packed.dtype() {
            DType::F32 => Panels::F32(Rows::new(packed)),
            DType::Bf16 => Panels::Bf16(Rows::new(packed)),
            DType::I32 => panic!("weights are F32 or Bf16"),
        }
    }

    /// One panel.
    pub fn get(&self, panel: usize) -> Panel<'a> {
        match self {
            Panels::F32(rows) => Panel::F32(rows.row(panel)),
            Panels::Bf16(rows) => Panel::Bf16(rows.row(panel)),
        }
    }
}

/// Where a panel's columns come from: columns `[first, first + PANEL)` of `matrix`, as far as they exist.
pub struct Source<'a> {
    /// The matrix in host memory.
    pub matrix: &'a HostMatrix,
    /// Its first column (row of the host matrix) in this panel.
    pub first: usize,
}

/// Packs panel after panel into a new tensor `[panels, padded k * PANEL]`.
///
/// # Errors
/// [`crate::Error::Memory`] when the tensor cannot be allocated.
pub fn pack<'a>(
    pool: &Pool,
    panels: usize,
    k: usize,
    dtype: DType,
    source: impl Fn(usize) -> Source<'a> + Sync,
) -> Result<Tensor> {
    let mut tensor = memory::tensor(dtype, panels, padded_k(k, dtype).saturating_mul(PANEL))?;
    match dtype {
        DType::F32 => pack_as::<f32>(pool, &mut tensor, &source),
        DType::Bf16 => pack_as::<bf16>(pool, &mut tensor, &source),
        DType::I32 => panic!("weights are F32 or Bf16"),
    }
    Ok(tensor)
}

fn pack_as<'a, T: Packed>(pool: &Pool, tensor: &mut Tensor, source: &(impl Fn(usize) -> Source<'a> + Sync)) {
    let rows = RowsMut::<T>::new(tensor.view_mut());
    pool.run(rows.rows(), &|panel| {
        // SAFETY: each panel is written by one task.
        let to = unsafe { rows.part(panel, 0..rows.cols()) };
        let Source { matrix, first } = source(panel);
        let columns = matrix.n.saturating_sub(first).min(PANEL);
        let range = first * matrix.k..(first + columns) * matrix.k;
        match &matrix.data {
            HostData::F32(data) => scatter(&data[range], matrix.k, to, T::from_f32),
            HostData::Bf16(data) => scatter(&data[range], matrix.k, to, T::from_bf16),
        }
    });
}

/// Writes the columns of one panel; what it leaves is zero already.
fn scatter<F: Copy, T: Packed>(columns: &[F], k: usize, to: &mut [T], convert: impl Fn(F) -> T) {
    if k == 0 {
        return;
    }
    let group = T::GROUP;
    // Groups of k outside, columns inside: the panel is written front to back.
    for start in (0..k).step_by(group) {
        let row = &mut to[start * PANEL..][..PANEL * group];
        for (column, cell) in columns.chunks_exact(k).zip(row.chunks_exact_mut(group)) {
            for (x, to) in column[start..].iter().zip(cell) {
                *to = convert(*x);
            }
        }
    }
}

/// Element types of packed matrices.
trait Packed: Element {
    /// Consecutive k of one column that lie side by side.
    const GROUP: usize;
    fn from_f32(x: f32) -> Self;
    fn from_bf16(x: bf16) -> Self;
}

impl Packed for f32 {
    const GROUP: usize = 1;
    fn from_f32(x: f32) -> f32 {
        x
    }
    fn from_bf16(x: bf16) -> f32 {
        x.to_f32()
    }
}

impl Packed for bf16 {
    const GROUP: usize = 2;
    fn from_f32(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn from_bf16(x: bf16) -> bf16 {
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_its_place_and_the_rest_is_zero() {
        let pool = Pool::new(2).unwrap();
        for (n, k) in [(1, 1), (48, 4), (49, 3), (100, 7), (5, 0), (0, 5)] {
            let data = (0..n * k).map(|i| i as f32 + 1.0).collect();
            let matrix = HostMatrix { n, k, data: HostData::F32(data) };
            let source = |panel| Source { matrix: &matrix, first: panel * PANEL };
            let wide = pack(&pool, panels(n), k, DType::F32, source).unwrap();
            let pairs = pack(&pool, panels(n), k, DType::Bf16, source).unwrap();
            assert_eq!(wide.bytes(), packed_bytes(panels(n), k, DType::F32));
            assert_eq!(pairs.bytes(), packed_bytes(panels(n), k, DType::Bf16));
            for panel in 0..panels(n) {
                let wide = Rows::<f32>::new(wide.view()).row(panel);
                let pairs = Rows::<bf16>::new(pairs.view()).row(panel);
                for column in 0..PANEL {
                    for i in 0..padded_k(k, DType::Bf16) {
                        let j = panel * PANEL + column;
                        let want = if j < n && i < k { (j * k + i + 1) as f32 } else { 0.0 };
                        assert_eq!(
                            pairs[(i / 2 * PANEL + column) * 2 + i % 2].to_f32(),
                            bf16::from_f32(want).to_f32()
                        );
                        if i < k {
                            assert_eq!(wide[i * PANEL + column], want);
                        }
                    }
                }
            }
        }
    }
}
