//! What goes into and comes out of a matrix product: activations in the form the instruction set wants, outputs in the form the
//! caller wants.

use std::ops::Range;

use half::bf16;

use super::CpuBackend;
use super::memory::{Rows, RowsMut, Scratch, ScratchGuard};
use super::panel::{PANEL, padded_k};
use super::simd::{Float, Kernel, LINE, Simd};
use super::tile;
use crate::backend::{DType, View, ViewMut};
use crate::error::Result;

/// Elements converted by one task; a smaller conversion stays on the calling thread.
const TASK_ELEMENTS: usize = 1 << 16;
/// Up to so many rows, or panels that they are multiplied with, a copy is not worth its time, however far apart the rows are.
const FEW_ROWS: usize = 8;
const FEW_PANELS: usize = 4;

/// How a backend lays out activations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// f32, be it widened.
    F32,
    /// bf16 in whole pairs.
    Pairs,
}

impl Form {
    /// The form of activations of this type on this backend.
    pub fn of(backend: &CpuBackend, activations: DType) -> Form {
        if activations == DType::Bf16 && backend.dispatch(NativeDot) { Form::Pairs } else { Form::F32 }
    }

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Form::F32 => 4,
            Form::Pairs => 2,
        }
    }
}

/// Asks an instruction set for [`Simd::NATIVE_DOT`].
struct NativeDot;

impl Kernel for NativeDot {
    type Output = bool;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> bool {
        S::NATIVE_DOT
    }
}

/// Elements from one row to the next in buffers of ours: an odd number of cache lines, so whole pairs of either form. Rows a power of two apart, as wide as models
/// are, would all compete for the same few places of the L1 cache.
pub fn row_stride(k: usize, form: Form) -> usize {
    let line = LINE / form.bytes();
    (k.div_ceil(line) | 1) * line
}

/// See [`crate::backend::Backend::row_pitch`]: rows that need no conversion can be multiplied where they are.
pub(super) fn row_pitch(backend: &CpuBackend, dtype: DType, cols: usize) -> usize {
    match (dtype, Form::of(backend, dtype)) {
        (DType::F32, form) | (DType::Bf16, form @ Form::Pairs) => row_stride(cols, form),
        _ => cols,
    }
}

/// Activations ready for [`tile::PanelProduct`], in place where they can be used as they are.
pub struct Activations<'a> {
    rows: tile::Rows,
    /// Keeps the converted copy.
    _copy: Option<ScratchGuard<'a>>,
}

impl<'a> Activations<'a> {
    /// Prepares `x` for weights of a type, where at most `tallest` rows pass together over each of so many panels: every row has
    /// [`padded_k`] elements, zero beyond its width. A copy goes to `scratch`.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] when scratch for a converted copy cannot grow.
    pub fn new(
        backend: &CpuBackend,
        scratch: &'a Scratch,
        x: View<'a>,
        (tallest, panels): (usize, usize),
        weights: DType,
    ) -> Result<Activations<'a>> {
        let few = tallest <= FEW_ROWS || panels <= FEW_PANELS;
        let pitch = x.stride() * x.dtype().bytes();
        let spread = pitch.is_multiple_of(LINE) && pitch / LINE % 2 == 1;
        let in_place = (few || spread) && x.cols() == padded_k(x.cols(), weights);
        match (x.dtype(), Form::of(backend, x.dtype())) {
            (DType::F32, _) if in_place => {
                let rows = tile::Rows::F32 { start: Rows::<f32>::new(x).as_ptr(), stride: x.stride() };
                Ok(Activations { rows, _copy: None })
            }
            (DType::Bf16, Form::Pairs) if in_place => {
                let rows = tile::Rows::Pairs { start: Rows::<bf16>::new(x).as_ptr(), stride: x.stride() };
                Ok(Activations { rows, _copy: None })
            }
            (DType::F32, form) => Self::copied::<f32>(backend, scratch, x, form),
            (DType::Bf16, form) => Self::copied::<bf16>(backend, scratch, x, form),
            (DType::I32 | DType::I8 | DType::F8 | DType::I4x2, _) => panic!("activations are F32 or Bf16"),
        }
    }

    /// A copy in scratch, padded with zeros, widened where the form asks for it.
    fn copied<X: Float>(backend: &CpuBackend, scratch: &'a Scratch, x: View<'_>, form: Form) -> Result<Self> {
        let stride = row_stride(x.cols(), form);
        let mut copy = scratch.lock(x.rows() * stride * form.bytes())?;
        let rows = match form {
            Form::F32 => {
                let to = copy.as_mut_slice::<f32>();
                convert(backend, Rows::<X>::new(x), to, stride);
                tile::Rows::F32 { start: to.as_ptr(), stride }
            }
            Form::Pairs => {
                let to = copy.as_mut_slice::<bf16>();
                convert(backend, Rows::<X>::new(x), to, stride);
                tile::Rows::Pairs { start: to.as_ptr(), stride }
            }
        };
        Ok(Activations { rows, _copy: Some(copy) })
    }

    /// The rows, valid as long as `self`.
    pub fn rows(&self) -> tile::Rows {
        self.rows
    }
}

/// Fills rows of `stride` in `to` with those of `x`, zero beyond their width.
fn convert<X: Float, T: Float>(backend: &CpuBackend, x: Rows<'_, X>, to: &mut [T], stride: usize) {
    let rows = x.rows();
    assert!(to.len() >= rows * stride, "{} elements for {rows} rows of {stride}", to.len());
    let rows_per_task = TASK_ELEMENTS.div_ceil(stride);
    let to = Shared(to.as_mut_ptr());
    backend.pool().run(rows.div_ceil(rows_per_task), &|task| {
        let to = &to;
        for row in task * rows_per_task..rows.min((task + 1) * rows_per_task) {
            // SAFETY: row `row` of `to`, which no other task touches.
            let to = unsafe { std::slice::from_raw_parts_mut(to.0.add(row * stride), stride) };
            let (body, padding) = to.split_at_mut(x.cols());
            backend.dispatch(Copy { from: x.row(row), to: body });
            padding.fill(T::default());
        }
    });
}

/// An address that threads share.
struct Shared<T>(*mut T);
// SAFETY: whoever follows it answers for it.
unsafe impl<T: Send> Sync for Shared<T> {}

/// `to = from`, converted.
struct Copy<'a, F, T> {
    from: &'a [F],
    to: &'a mut [T],
}

impl<F: Float, T: Float> Kernel for Copy<'_, F, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (from, to) in self.from.chunks(S::LANES).zip(self.to.chunks_mut(S::LANES)) {
            // SAFETY: both chunks have the same length, LANES at most.
            unsafe {
                if from.len() == S::LANES {
                    T::store(simd, to.as_mut_ptr(), F::load(simd, from.as_ptr()));
                } else {
                    let v = F::load_head(simd, from.as_ptr(), from.len());
                    T::store_head(simd, to.as_mut_ptr(), to.len(), v);
                }
            }
        }
    }
}

/// Where finished sums go: rows of the caller's tensor, shared by tasks that write different parts.
pub enum Output<'a> {
    /// Full precision.
    F32(RowsMut<'a, f32>),
    /// Rounded to nearest even.
    Bf16(RowsMut<'a, bf16>),
}

impl<'a> Output<'a> {
    /// Wraps a view of either type.
    pub fn new(view: ViewMut<'a>) -> Output<'a> {
        match view.dtype() {
            DType::F32 => Output::F32(RowsMut::new(view)),
            DType::Bf16 => Output::Bf16(RowsMut::new(view)),
            DType::I32 | DType::I8 | DType::F8 | DType::I4x2 => panic!("products are F32 or Bf16"),
        }
    }

    /// Writes a block of sums `[rows, PANEL]`, plus `bias` if any, to some columns of rows from `row` on; sums beyond these are padding
    /// and are dropped. `bias` is that of the whole matrix.
    ///
    /// # Safety
    /// Nobody else touches this block of the matrix meanwhile.
    pub unsafe fn write(
        &self,
        backend: &CpuBackend,
        sums: &[f32],
        row: usize,
        columns: Range<usize>,
        bias: Option<&[f32]>,
    ) {
        let bias = bias.map(|bias| &bias[columns.clone()]);
        // SAFETY: the caller's promise, passed on to the kernel that relies on it.
        unsafe {
            match self {
                Output::F32(to) => backend.dispatch(Finish::new(sums, bias, to, row, columns)),
                Output::Bf16(to) => backend.dispatch(Finish::new(sums, bias, to, row, columns)),
            }
        }
    }
}

/// `to = sums (+ bias)`, rounded, for a block of rows and the columns of one panel.
struct Finish<'a, T> {
    sums: &'a [f32],
    bias: Option<&'a [f32]>,
    to: &'a RowsMut<'a, T>,
    row: usize,
    columns: Range<usize>,
}

impl<'a, T> Finish<'a, T> {
    /// # Safety
    /// Nobody else touches these columns of as many rows from `row` on as there are sums.
    unsafe fn new(
        sums: &'a [f32],
        bias: Option<&'a [f32]>,
        to: &'a RowsMut<'a, T>,
        row: usize,
        columns: Range<usize>,
    ) -> Self {
        Finish { sums, bias, to, row, columns }
    }
}

impl<T: Float> Kernel for Finish<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (number, sums) in self.sums.chunks_exact(PANEL).enumerate() {
            // SAFETY: `new` was promised this part.
            let to = unsafe { self.to.part(self.row + number, self.columns.clone()) };
            for at in (0..to.len()).step_by(S::LANES) {
                let lanes = S::LANES.min(to.len() - at);
                // SAFETY: LANES divides PANEL, so a whole vector of sums exists; `lanes` elements of the others do.
                unsafe {
                    let mut v = simd.load(sums.as_ptr().add(at));
                    if let Some(bias) = self.bias {
                        v = simd.add(v, simd.load_head(bias.as_ptr().add(at), lanes));
                    }
                    if lanes == S::LANES {
                        T::store(simd, to.as_mut_ptr().add(at), v);
                    } else {
                        T::store_head(simd, to.as_mut_ptr().add(at), lanes, v);
                    }
                }
            }
        }
    }
}
