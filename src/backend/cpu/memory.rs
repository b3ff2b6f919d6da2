//! Host memory: aligned, zeroed blocks, and the only place that turns a [`View`] into a slice.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use half::bf16;

use crate::backend::{DType, DeviceId, Storage, Tensor, View, ViewMut};
use crate::error::{Error, Result};

/// Alignment of every block: a cache line, and the widest vector register.
const ALIGN: usize = 64;

/// An owned, zeroed block of host memory.
struct Block {
    start: NonNull<u8>,
    layout: Layout,
    bytes: usize,
}

// SAFETY: the block is plain memory owned by this value; access goes through borrows of the tensor around it.
unsafe impl Send for Block {}
// SAFETY: as above; `&Block` only hands out its address.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc_zeroed` with this layout and is freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl Storage for Block {
    fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
    fn device(&self) -> DeviceId {
        DeviceId::Cpu
    }
}

/// A zeroed tensor in host memory.
///
/// # Errors
/// [`Error::Memory`] when the system has not that much.
pub(in crate::backend) fn alloc(dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
    let full = || Error::Memory {
        device: "cpu".into(),
        sum: format!("a tensor [{rows}, {cols}] of {dtype:?} could not be allocated"),
    };
    let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.bytes())).ok_or_else(full)?;
    let layout = Layout::from_size_align(bytes.max(1), ALIGN).map_err(|_| full())?;
    // SAFETY: the layout's size is at least 1.
    let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(full)?;
    Ok(Tensor::new(Box::new(Block { start, layout, bytes }), dtype, rows, cols))
}

/// A Rust type that tensors hold. Every bit pattern is a value of it.
pub(in crate::backend) trait Element: Copy + Send + Sync + 'static {
    /// The tag of this type.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}

/// Elements from the first to the last of a view, the gaps between rows included.
fn span(view: &View<'_>) -> usize {
    if view.rows() == 0 || view.cols() == 0 { 0 } else { (view.rows() - 1) * view.stride() + view.cols() }
}

fn assert_host<T: Element>(view: &View<'_>) {
    assert!(view.device() == DeviceId::Cpu, "a view of {:?} read on the CPU", view.device());
    assert!(view.dtype() == T::DTYPE, "a view of {:?} read as {:?}", view.dtype(), T::DTYPE);
}

/// The elements of a view: row i starts at `i * view.stride()`.
///
/// # Panics
/// When the view is not host memory of type `T`.
pub(in crate::backend) fn slice<'a, T: Element>(view: View<'a>) -> &'a [T] {
    assert_host::<T>(&view);
    // SAFETY: views of the CPU are made from `Block`s only and stay inside them; the memory is initialised, aligned
    // to `T`, alive for 'a and, as the view is a shared borrow of its tensor, not written during 'a.
    unsafe { std::slice::from_raw_parts(view.address() as *const T, span(&view)) }
}

/// The elements of a view, to write: row i starts at `i * view.stride()`.
///
/// # Panics
/// When the view is not host memory of type `T`.
pub(in crate::backend) fn slice_mut<'a, T: Element>(view: ViewMut<'a>) -> &'a mut [T] {
    let shared = view.as_view();
    assert_host::<T>(&shared);
    // SAFETY: as in `slice`; a `ViewMut` is an exclusive borrow of its tensor, is consumed here, and cannot be divided
    // into two that live at once, so the gaps between rows belong to nobody else either.
    unsafe { std::slice::from_raw_parts_mut(shared.address() as *mut T, span(&shared)) }
}
