//! Device memory as matrices: [`Tensor`] owns it, [`View`] and [`ViewMut`] borrow it. A view is a plain
//! address with a shape; only the backend that allocated the memory may follow it, and checks that it did.

use std::marker::PhantomData;
use std::ops::Range;

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// Signed 32-bit integers (expert ids).
    I32,
    /// Signed 8-bit integers (quantised weights of experts, see [`super::int8`]).
    I8,
    /// float8_e4m3fn (quantised weights of experts, see [`super::quantized`]).
    F8,
    /// Pairs of 4-bit codes (quantised weights of experts, see [`super::quantized`]): an element is two of them.
    I4x2,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 => 2,
            DType::I8 | DType::F8 | DType::I4x2 => 1,
        }
    }
}

/// Identifies one memory space. A CPU has one; each GPU has its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceId {
    /// Host memory.
    Cpu,
    /// Memory of the GPU with this ordinal.
    Cuda(u32),
}

/// A block of device memory; freed on drop. Implemented by each backend.
pub trait Storage: Send + Sync {
    /// Device address of the first byte, aligned to at least 64.
    fn address(&self) -> usize;
    /// Bytes owned.
    fn bytes(&self) -> usize;
    /// The memory space it lives in.
    fn device(&self) -> DeviceId;
}

/// An owned row-major matrix `[rows, cols]` in device memory.
pub struct Tensor {
    storage: Box<dyn Storage>,
    dtype: DType,
    rows: usize,
    cols: usize,
}

impl Tensor {
    /// Wraps fresh storage. Called by backends only.
    ///
    /// # Panics
    /// When the storage is smaller than the shape needs.
    pub fn new(storage: Box<dyn Storage>, dtype: DType, rows: usize, cols: usize) -> Self {
        let need = rows
            .checked_mul(cols)
            .and_then(|n| n.checked_mul(dtype.bytes()))
            .expect("tensor size overflows usize");
        assert!(storage.bytes() >= need, "storage of {} bytes for a tensor of {need}", storage.bytes());
        Tensor { storage, dtype, rows, cols }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.storage.bytes()
    }
    /// The memory space it lives in.
    pub fn device(&self) -> DeviceId {
        self.storage.device()
    }

    /// The whole matrix, to read.
    pub fn view(&self) -> View<'_> {
        View {
            address: self.storage.address(),
            device: self.storage.device(),
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            stride: self.cols,
            borrow: PhantomData,
        }
    }

    /// The whole matrix, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        ViewMut { view: self.view(), borrow: PhantomData }
    }

    /// The first `rows * cols` elements as a matrix of that shape: how a buffer serves rows of several widths.
    ///
    /// # Panics
    /// When the tensor has fewer elements.
    pub fn reshaped(&self, rows: usize, cols: usize) -> View<'_> {
        let have = self.rows * self.cols;
        assert!(rows * cols <= have, "{rows} x {cols} elements from a tensor of {have}");
        View { rows, cols, stride: cols, ..self.view() }
    }

    /// [`Tensor::reshaped`], to write.
    pub fn reshaped_mut(&mut self, rows: usize, cols: usize) -> ViewMut<'_> {
        ViewMut { view: self.reshaped(rows, cols), borrow: PhantomData }
    }

    /// The first `rows` rows, to read: how a buffer made for the largest batch serves a smaller one.
    pub fn head(&self, rows: usize) -> View<'_> {
        self.view().rows_range(0..rows)
    }

    /// The first `rows` rows, to write.
    pub fn head_mut(&mut self, rows: usize) -> ViewMut<'_> {
        self.view_mut().rows_range(0..rows)
    }
}

/// A borrowed matrix to read; rows may be further apart than their width.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    address: usize,
    device: DeviceId,
    dtype: DType,
    rows: usize,
    cols: usize,
    stride: usize,
    borrow: PhantomData<&'a ()>,
}

impl<'a> View<'a> {
    /// Device address of element (0, 0).
    pub fn address(&self) -> usize {
        self.address
    }
    /// The memory space it points into.
    pub fn device(&self) -> DeviceId {
        self.device
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Elements from one row to the next; at least `cols`.
    pub fn stride(&self) -> usize {
        self.stride
    }
    /// Rows lie one after another without a gap.
    pub fn is_contiguous(&self) -> bool {
        self.stride == self.cols || self.rows <= 1
    }

    /// Some consecutive rows.
    ///
    /// # Panics
    /// When the range leaves the matrix.
    pub fn rows_range(self, range: Range<usize>) -> View<'a> {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        View {
            address: self.address + range.start * self.stride * self.dtype.bytes(),
            rows: range.len(),
            ..self
        }
    }

    /// Some consecutive columns of every row.
    ///
    /// # Panics
    /// When the range leaves the matrix.
    pub fn cols_range(self, range: Range<usize>) -> View<'a> {
        assert!(range.start <= range.end && range.end <= self.cols, "columns {range:?} of {}", self.cols);
        View { address: self.address + range.start * self.dtype.bytes(), cols: range.len(), ..self }
    }
}

/// A borrowed matrix to write.
#[derive(Debug)]
pub struct ViewMut<'a> {
    view: View<'a>,
    borrow: PhantomData<&'a mut ()>,
}

impl<'a> ViewMut<'a> {
    /// The same memory, to read, for as long as this view is not written.
    pub fn as_view(&self) -> View<'_> {
        self.view
    }

    /// A shorter-lived view of the same memory.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { view: self.view, borrow: PhantomData }
    }

    /// Some consecutive rows.
    pub fn rows_range(self, range: Range<usize>) -> ViewMut<'a> {
        ViewMut { view: self.view.rows_range(range), borrow: PhantomData }
    }

    /// The rows before `at`, and those from there on.
    ///
    /// # Panics
    /// When the matrix has fewer rows.
    pub fn split_rows(self, at: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        let (before, after) = (self.view.rows_range(0..at), self.view.rows_range(at..self.view.rows));
        (ViewMut { view: before, borrow: PhantomData }, ViewMut { view: after, borrow: PhantomData })
    }

    /// Some consecutive columns of every row.
    pub fn cols_range(self, range: Range<usize>) -> ViewMut<'a> {
        ViewMut { view: self.view.cols_range(range), borrow: PhantomData }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.view.dtype
    }
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.view.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.view.cols
    }
    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.view.stride
    }
}
