//! Matrices of f32 in ordinary memory: what the reference computes with.

use half::bf16;

use crate::backend::cpu::memory::{Element, F8, I4x2, Rows, RowsMut};
use crate::backend::{DType, HostData, HostMatrix, View, ViewMut};

/// A contiguous row-major matrix.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Host {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) data: Vec<f32>,
}

impl Host {
    /// Zeros.
    pub(super) fn new(rows: usize, cols: usize) -> Self {
        Host { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// One row.
    pub(super) fn of_vector(data: &[f32]) -> Self {
        Host { rows: 1, cols: data.len(), data: data.to_vec() }
    }

    /// A weight matrix, widened.
    pub(super) fn of_weights(host: &HostMatrix<'_>) -> Self {
        let data = match &host.data {
            HostData::F32(data) => data.clone(),
            HostData::Bf16(data) => data.iter().map(|x| x.to_f32()).collect(),
            HostData::Quantized(data) => data.weights().into_iter().map(bf16::to_f32).collect(),
        };
        Host { rows: host.n, cols: host.k, data }
    }

    /// The elements of a view, widened.
    pub(super) fn read(view: View<'_>) -> Self {
        let data = match view.dtype() {
            DType::F32 => elements::<f32>(view).collect(),
            DType::Bf16 => elements::<bf16>(view).map(bf16::to_f32).collect(),
            other => panic!("{other:?} read as activations"),
        };
        Host { rows: view.rows(), cols: view.cols(), data }
    }

    /// Stores into a view, rounded to its type.
    pub(super) fn write(&self, view: ViewMut<'_>) {
        assert_eq!((self.rows, self.cols), (view.rows(), view.cols()), "shape written");
        match view.dtype() {
            DType::F32 => fill(view, self.data.iter().copied()),
            DType::Bf16 => fill(view, self.data.iter().map(|&x| bf16::from_f32(x))),
            other => panic!("activations written as {other:?}"),
        }
    }

    /// Row i.
    pub(super) fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.cols..][..self.cols]
    }

    /// Row i, to write.
    pub(super) fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.cols..][..self.cols]
    }

    /// Every element replaced by `f(row, column, element)`.
    pub(super) fn map(mut self, f: impl Fn(usize, usize, f32) -> f32) -> Self {
        for i in 0..self.rows {
            for (d, x) in self.row_mut(i).iter_mut().enumerate() {
                *x = f(i, d, *x);
            }
        }
        self
    }
}

/// `x` as it is after a round trip through `dtype`.
pub(super) fn rounded(x: f32, dtype: DType) -> f32 {
    if dtype == DType::Bf16 { bf16::from_f32(x).to_f32() } else { x }
}

/// The elements of a view in row-major order, without the gaps between rows.
fn elements<'a, T: Element>(view: View<'a>) -> impl Iterator<Item = T> + 'a {
    let rows = Rows::<T>::new(view);
    (0..view.rows()).flat_map(move |i| rows.row(i).iter().copied())
}

/// Stores row-major elements into a view.
fn fill<T: Element>(view: ViewMut<'_>, values: impl Iterator<Item = T>) {
    let mut rows = RowsMut::<T>::new(view);
    let mut values = values;
    for i in 0..rows.rows() {
        for x in rows.row_mut(i) {
            *x = values.next().expect("as many values as elements");
        }
    }
}

/// Integers into a view.
pub(super) fn write_ints<T: Element>(values: &[T], view: ViewMut<'_>) {
    fill(view, values.iter().copied());
}

/// Integers of a view.
pub(super) fn read_ints<T: Element>(view: View<'_>) -> Vec<T> {
    elements(view).collect()
}

/// Integers from one view to another.
pub(super) fn copy_ints<T: Element>(src: View<'_>, dst: ViewMut<'_>) {
    fill(dst, elements::<T>(src));
}

/// Little-endian bytes into a view.
pub(super) fn upload(src: &[u8], dst: ViewMut<'_>) {
    let quads = || src.as_chunks::<4>().0.iter().copied();
    match dst.dtype() {
        DType::F32 => fill(dst, quads().map(f32::from_le_bytes)),
        DType::I32 => fill(dst, quads().map(i32::from_le_bytes)),
        DType::Bf16 => fill(dst, src.as_chunks::<2>().0.iter().copied().map(bf16::from_le_bytes)),
        DType::I8 => fill(dst, src.iter().map(|&byte| byte as i8)),
        DType::F8 => fill(dst, src.iter().copied().map(F8)),
        DType::I4x2 => fill(dst, src.iter().copied().map(I4x2)),
    }
}

/// A view into little-endian bytes.
pub(super) fn download(src: View<'_>, dst: &mut [u8]) {
    let quads = |dst: &mut [u8], values: &mut dyn Iterator<Item = [u8; 4]>| {
        for (bytes, value) in dst.as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *bytes = value;
        }
    };
    match src.dtype() {
        DType::F32 => quads(dst, &mut elements::<f32>(src).map(f32::to_le_bytes)),
        DType::I32 => quads(dst, &mut elements::<i32>(src).map(i32::to_le_bytes)),
        DType::I8 => dst.iter_mut().zip(elements::<i8>(src)).for_each(|(byte, value)| *byte = value as u8),
        DType::F8 => dst.iter_mut().zip(elements::<F8>(src)).for_each(|(byte, F8(code))| *byte = code),
        DType::I4x2 => dst.iter_mut().zip(elements::<I4x2>(src)).for_each(|(byte, I4x2(pair))| *byte = pair),
        DType::Bf16 => {
            for (bytes, value) in dst.as_chunks_mut::<2>().0.iter_mut().zip(elements::<bf16>(src)) {
                *bytes = value.to_le_bytes();
            }
        }
    }
}
