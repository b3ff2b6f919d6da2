//! How weight matrices lie in memory. A matrix `[n, k]` is cut into panels of [`PANEL`] output columns, or narrower ones ([`Cut`]); a
//! panel is contiguous and k-major, so that a kernel reads it once, front to back:
//! * f32: `[k][columns]`;
//! * bf16: `[k / 2][columns][2]`, the pairs that AVX-512's dot product takes; an odd k is padded with a zero.
//!
//! The last panel has as many columns as are left, padded with zeros to whole vectors of [`MAX_LANES`]. All instruction sets share the layout, so a packed expert can move
//! between ranks that run different ones.

use std::ops::Range;

use half::bf16;

use super::memory::{self, Element, Rows, RowsMut};
use super::pool::Pool;
use super::simd::{LINE, MAX_LANES};
use crate::backend::{DType, HostData, HostMatrix, Tensor, View};
use crate::error::Result;

/// Output columns of one panel. 48 is three registers of AVX-512 or six of AVX2: with 8 rows of the one (24 accumulators of
/// 32 registers) and 6 rows x a third of the panel of the other (12 of 16) a tile does at least two multiplications
/// per load, and one row alone still has enough independent sums to hide the latency of a multiplication.
pub const PANEL: usize = 48;

/// Panels into which a matrix is cut, if it is wide enough: among fewer, threads would have unequal parts, and a router is read by all of
/// them in a few microseconds.
const FEWEST: usize = 4;
/// A panel that is not whole has two vectors: with one, a single row would wait for its own sums.
const NARROW: usize = 2 * MAX_LANES;

/// Whole panels of `n` columns.
pub fn panels(n: usize) -> usize {
    Cut::wide(n).panels()
}

/// How the columns of a matrix are divided into panels. The bits of a product do not depend on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    /// Columns of the matrix.
    n: usize,
    /// Columns of a panel, the last one apart: whole vectors, [`PANEL`] at most.
    width: usize,
}

impl Cut {
    /// Panels as wide as they can be.
    pub fn wide(n: usize) -> Cut {
        Cut { n, width: PANEL }
    }

    /// The same, or up to [`FEWEST`] narrower ones.
    pub fn even(n: usize) -> Cut {
        Cut { n, width: if n <= FEWEST * NARROW { NARROW } else { PANEL } }
    }

    /// How many there are.
    pub fn panels(self) -> usize {
        self.n.div_ceil(self.width)
    }

    /// The matrix's columns in a panel.
    pub fn range(self, panel: usize) -> Range<usize> {
        let first = panel * self.width;
        first..self.n.min(first + self.width)
    }

    /// Columns of a panel with padding: the last panel has as many whole vectors as it needs. Reading is what a product of few rows
    /// costs, and padding would be read like weights.
    pub fn columns(self, panel: usize) -> usize {
        self.range(panel).len().next_multiple_of(MAX_LANES)
    }

    /// Where a panel of one of some matrices lies: panels in order, of each the same one of every matrix.
    pub fn place(self, depth: usize, matrices: usize, panel: usize, matrix: usize) -> Range<usize> {
        let columns = self.columns(panel);
        let start = (panel * self.width * matrices + matrix * columns) * depth;
        start..start + columns * depth
    }
}

/// `k` as packed: whole pairs for bf16, whole quads for 8 bits.
pub fn padded_k(k: usize, dtype: DType) -> usize {
    match dtype {
        DType::Bf16 => k.next_multiple_of(2),
        DType::I8 => k.next_multiple_of(4),
        DType::F32 | DType::I32 | DType::F8 | DType::I4x2 => k,
    }
}

/// Bytes of `[n, k]` as panels; saturates, as nothing of that size can be allocated.
pub fn packed_bytes(n: usize, k: usize, dtype: DType) -> usize {
    let n = n.checked_next_multiple_of(MAX_LANES).unwrap_or(usize::MAX);
    n.saturating_mul(padded_k(k, dtype)).saturating_mul(dtype.bytes())
}

/// Packed weights of either type.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    /// `[k][columns]`
    F32(&'a [f32]),
    /// `[k / 2][columns][2]`
    Bf16(&'a [bf16]),
}

/// One packed panel.
#[derive(Clone, Copy)]
pub struct Panel<'a> {
    /// All of it.
    pub weights: Weights<'a>,
    /// [`PANEL`], or fewer whole vectors.
    pub columns: usize,
}

/// The panels of some packed matrices of one shape, see [`pack`].
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    weights: Weights<'a>,
    /// The columns of one matrix.
    cut: Cut,
    /// k as packed.
    depth: usize,
    /// How many matrices.
    matrices: usize,
}

impl<'a> Panels<'a> {
    /// A tensor made by [`pack`] of so many matrices of k inputs.
    ///
    /// # Panics
    /// When it is not: kernels rely on it.
    pub fn new(packed: View<'a>, matrices: usize, cut: Cut, k: usize) -> Self {
        let n = cut.n;
        let dtype = packed.dtype();
        let depth = padded_k(k, dtype);
        let (found, expected) =
            (packed.rows() * packed.cols(), matrices * n.next_multiple_of(MAX_LANES) * depth);
        assert!(found == expected, "{found} packed weights of {matrices} x [{n}, {k}], expected {expected}");
        let weights = match dtype {
            DType::F32 => Weights::F32(Rows::new(packed).all()),
            DType::Bf16 => Weights::Bf16(Rows::new(packed).all()),
            DType::I32 | DType::I8 | DType::F8 | DType::I4x2 => panic!("weights are F32 or Bf16"),
        };
        Panels { weights, cut, depth, matrices }
    }

    /// One panel of one of the matrices.
    pub fn get(&self, panel: usize, matrix: usize) -> Panel<'a> {
        let range = self.cut.place(self.depth, self.matrices, panel, matrix);
        let weights = match self.weights {
            Weights::F32(all) => Weights::F32(&all[range]),
            Weights::Bf16(all) => Weights::Bf16(&all[range]),
        };
        Panel { weights, columns: self.cut.columns(panel) }
    }
}

/// Packs matrices of one shape into a new tensor of one row: panel 0 of each, panel 1 of each, and so on.
///
/// # Errors
/// [`crate::Error::Memory`] when the tensor cannot be allocated.
///
/// # Panics
/// When the shapes differ, or `cut` is of another width.
pub fn pack(pool: &Pool, matrices: &[&HostMatrix<'_>], cut: Cut, dtype: DType) -> Result<Tensor> {
    let (n, k) = (cut.n, matrices[0].k);
    for matrix in matrices {
        assert!((matrix.n, matrix.k) == (n, k), "[{}, {}] beside [{n}, {k}]", matrix.n, matrix.k);
    }
    let elements = packed_bytes(n, k, dtype).saturating_mul(matrices.len()) / dtype.bytes();
    let mut tensor = memory::lasting_tensor(dtype, 1, elements)?;
    match dtype {
        DType::F32 => pack_as::<f32>(pool, &mut tensor, matrices, cut),
        DType::Bf16 => pack_as::<bf16>(pool, &mut tensor, matrices, cut),
        DType::I32 | DType::I8 | DType::F8 | DType::I4x2 => panic!("weights are F32 or Bf16"),
    }
    Ok(tensor)
}

fn pack_as<T: Packed>(pool: &Pool, tensor: &mut Tensor, matrices: &[&HostMatrix<'_>], cut: Cut) {
    let k = matrices[0].k;
    let packed = RowsMut::<T>::new(tensor.view_mut());
    pool.run(cut.panels() * matrices.len(), &|task| {
        let (panel, matrix) = (task / matrices.len(), task % matrices.len());
        // SAFETY: each panel is written by one task.
        let to = unsafe { packed.part(0, cut.place(padded_k(k, T::DTYPE), matrices.len(), panel, matrix)) };
        let columns = cut.range(panel);
        let range = columns.start * k..columns.end * k;
        match &matrices[matrix].data {
            HostData::F32(data) => scatter(&data[range], k, (to, cut.columns(panel)), T::from_f32),
            HostData::Bf16(data) => T::scatter_bf16(&data[range], k, (to, cut.columns(panel))),
            HostData::Quantized(data) => panic!("a CPU packs no weights in {:?}", data.dtype()),
        }
    });
}

/// Writes the columns of one panel; what it leaves is zero already.
fn scatter<F: Copy, T: Packed>(
    columns: &[F],
    k: usize,
    (to, width): (&mut [T], usize),
    convert: impl Fn(F) -> T,
) {
    if k == 0 {
        return;
    }
    let group = T::GROUP;
    // Groups of k outside, columns inside: the panel is written front to back.
    for start in (0..k).step_by(group) {
        let row = &mut to[start * width..][..width * group];
        for (column, cell) in columns.chunks_exact(k).zip(row.chunks_exact_mut(group)) {
            for (x, to) in column[start..].iter().zip(cell) {
                *to = convert(*x);
            }
        }
    }
}

/// [`scatter`] of pairs that stay what they are, which is most of the work of loading: each moves as 32 bits, a cache line of a column
/// at a time.
fn scatter_pairs(columns: &[bf16], k: usize, (to, width): (&mut [bf16], usize)) {
    const PAIRS: usize = LINE / size_of::<[bf16; 2]>();
    let (cells, _) = to.as_chunks_mut::<2>();
    for (first, cells) in (0..k).step_by(2 * PAIRS).zip(cells.chunks_mut(PAIRS * width)) {
        for (column, from) in columns.chunks_exact(k).enumerate() {
            let (pairs, last) = from[first..k.min(first + 2 * PAIRS)].as_chunks::<2>();
            for (pair, row) in pairs.iter().zip(cells.chunks_exact_mut(width)) {
                row[column] = *pair;
            }
            // An odd k ends in half a pair.
            if let [last] = last {
                cells[pairs.len() * width + column][0] = *last;
            }
        }
    }
}

/// Element types of packed matrices.
trait Packed: Element {
    /// Consecutive k of one column that lie side by side.
    const GROUP: usize;
    fn from_f32(x: f32) -> Self;
    /// [`scatter`] of bf16.
    fn scatter_bf16(columns: &[bf16], k: usize, to: (&mut [Self], usize));
}

impl Packed for f32 {
    const GROUP: usize = 1;
    fn from_f32(x: f32) -> f32 {
        x
    }
    fn scatter_bf16(columns: &[bf16], k: usize, to: (&mut [f32], usize)) {
        scatter(columns, k, to, bf16::to_f32);
    }
}

impl Packed for bf16 {
    const GROUP: usize = 2;
    fn from_f32(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn scatter_bf16(columns: &[bf16], k: usize, to: (&mut [bf16], usize)) {
        scatter_pairs(columns, k, to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_its_place_and_the_rest_is_zero() {
        every_element(HostData::F32, f32::from);
        every_element(|data| HostData::Bf16(data.into()), bf16::from_f32);
    }

    /// Packs matrices of bf16 values, stored as some type.
    fn every_element<F>(store: impl Fn(Vec<F>) -> HostData<'static>, convert: impl Fn(f32) -> F) {
        let pool = Pool::new(2).unwrap();
        for (n, k) in [(1, 1), (48, 4), (49, 3), (70, 6), (100, 7), (50, 69), (3, 64), (5, 0), (0, 5)] {
            let element = |i: usize| (i * 7 % 256 + 1) as f32;
            let matrix = |sign: f32| {
                let data = (0..n * k).map(|i| convert(sign * element(i))).collect();
                HostMatrix { n, k, data: store(data) }
            };
            let matrices = [&matrix(1.0), &matrix(-1.0)];
            for cut in [Cut::wide(n), Cut::even(n)] {
                let wide = pack(&pool, &matrices, cut, DType::F32).unwrap();
                let pairs = pack(&pool, &matrices, cut, DType::Bf16).unwrap();
                assert_eq!(wide.bytes(), 2 * packed_bytes(n, k, DType::F32));
                assert_eq!(pairs.bytes(), 2 * packed_bytes(n, k, DType::Bf16));
                let (wide, pairs) =
                    (Panels::new(wide.view(), 2, cut, k), Panels::new(pairs.view(), 2, cut, k));
                for panel in 0..cut.panels() {
                    for (matrix, sign) in [1.0, -1.0].into_iter().enumerate() {
                        let (wide, pairs) = (wide.get(panel, matrix), pairs.get(panel, matrix));
                        let (Weights::F32(f32s), Weights::Bf16(bf16s)) = (wide.weights, pairs.weights) else {
                            panic!("panels of another type");
                        };
                        assert_eq!(wide.columns, pairs.columns);
                        assert!(panel * cut.width + wide.columns < n + MAX_LANES, "{} columns", wide.columns);
                        for column in 0..wide.columns {
                            for i in 0..padded_k(k, DType::Bf16) {
                                let j = panel * cut.width + column;
                                let want = if j < n && i < k { sign * element(j * k + i) } else { 0.0 };
                                let pair = bf16s[(i / 2 * pairs.columns + column) * 2 + i % 2];
                                assert_eq!(pair.to_f32(), want);
                                if i < k {
                                    assert_eq!(f32s[i * wide.columns + column], want);
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn few_columns_are_divided_evenly() {
        let widths = |n| {
            let cut = Cut::even(n);
            (0..cut.panels()).map(|panel| cut.columns(panel)).collect::<Vec<_>>()
        };
        assert!(widths(0).is_empty());
        assert_eq!(widths(8), [16]);
        assert_eq!(widths(64), [32, 32]);
        assert_eq!(widths(72), [32, 32, 16]);
        assert_eq!(widths(128), [32, 32, 32, 32]);
        assert_eq!(widths(160), [48, 48, 48, 16]);
        assert_eq!(Cut::even(1024), Cut::wide(1024));
    }
}
