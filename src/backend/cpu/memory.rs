//! Host memory: the storage behind CPU tensors, scratch that is grown once, and the only place where a [`View`]
//! becomes slices.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::bf16;

use crate::backend::{DType, DeviceId, Storage, Tensor, View, ViewMut};
use crate::error::{Error, Result};

/// Alignment of every block: a cache line, and the width of an AVX-512 register.
const ALIGN: usize = 64;
/// Blocks from this size on are mapped by themselves, on huge pages where the system grants them: a weight panel
/// then costs one TLB entry instead of a hundred.
const LARGE: usize = 4 << 20;
/// Alignment of large blocks: one huge page.
const HUGE_PAGE: usize = 2 << 20;

/// Virtual size of a [`Chunk`].
const CHUNK: usize = 128 << 20;

/// A block of zeroed host memory, aligned to a cache line.
pub struct Block {
    address: NonNull<u8>,
    bytes: usize,
    owner: Owner,
}

/// Whose memory a block is.
enum Owner {
    /// Its own, of this layout.
    Block(Layout),
    /// A chunk's, which lives as long as one of its blocks.
    #[expect(dead_code, reason = "held, not read")]
    Chunk(Arc<Chunk>),
}

// SAFETY: a block owns its memory as `Vec<u8>` does; shared access only reads the address and the size.
unsafe impl Send for Block {}
// SAFETY: see above.
unsafe impl Sync for Block {}

impl Block {
    /// `bytes` zeroed bytes.
    ///
    /// # Errors
    /// [`Error::Memory`] when the system refuses them.
    pub fn zeroed(bytes: usize) -> Result<Block> {
        let refused = || Error::Memory { device: "cpu".into(), sum: format!("{bytes} bytes refused") };
        let align = if bytes >= LARGE { HUGE_PAGE } else { ALIGN };
        // One byte at least, so that the address is always an allocation's.
        let layout = Layout::from_size_align(bytes.max(1), align).map_err(|_| refused())?;
        let address = allocate(layout).ok_or_else(refused)?;
        Ok(Block { address, bytes, owner: Owner::Block(layout) })
    }

    /// `bytes` zeroed bytes that are to stay for long: weights. Blocks that are no multiple of a huge page share some, so that all of
    /// a model lies on huge pages without a gap behind each matrix. What a block leaves is given back with the last of its neighbours.
    ///
    /// # Errors
    /// [`Error::Memory`] when the system refuses them.
    pub fn lasting(bytes: usize) -> Result<Block> {
        let Some(size) = bytes.checked_next_multiple_of(ALIGN).filter(|&size| size <= CHUNK / 2) else {
            return Block::zeroed(bytes);
        };
        CURRENT.with_borrow_mut(|current| {
            if current.as_ref().is_none_or(|(_, used)| used + size > CHUNK) {
                *current = Some((Arc::new(Chunk::new()?), 0));
            }
            let (chunk, used) = current.as_mut().expect("made above");
            let address = chunk.address.as_ptr().wrapping_add(*used);
            *used += size;
            Ok(Block {
                address: NonNull::new(address).expect("inside a mapping"),
                bytes,
                owner: Owner::Chunk(Arc::clone(chunk)),
            })
        })
    }

    /// The whole block as elements of one type.
    fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        // SAFETY: the block is initialised, exclusively borrowed, aligned for every element type, and any bits are a value of
        // every element type.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr().cast(), self.bytes / size_of::<T>()) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Owner::Block(layout) = self.owner {
            release(self.address, layout);
        }
    }
}

/// Memory for many lasting blocks, handed out from front to back. Pages that nobody has written yet cost nothing.
struct Chunk {
    address: NonNull<u8>,
}

// SAFETY: a chunk only owns its mapping; blocks of it lie apart.
unsafe impl Send for Chunk {}
// SAFETY: see above.
unsafe impl Sync for Chunk {}

thread_local! {
    /// The chunk that this thread's next lasting blocks come from, and how much of it is taken. By thread: each rank loads what it
    /// holds, and pages belong near the core that wrote them first.
    static CURRENT: RefCell<Option<(Arc<Chunk>, usize)>> = const { RefCell::new(None) };
}

impl Chunk {
    fn layout() -> Layout {
        Layout::from_size_align(CHUNK, HUGE_PAGE).expect("constants")
    }

    fn new() -> Result<Chunk> {
        let refused = || Error::Memory { device: "cpu".into(), sum: format!("{CHUNK} bytes refused") };
        Ok(Chunk { address: allocate(Self::layout()).ok_or_else(refused)? })
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        release(self.address, Self::layout());
    }
}

impl Storage for Block {
    fn address(&self) -> usize {
        self.address.as_ptr() as usize
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
    fn device(&self) -> DeviceId {
        DeviceId::Cpu
    }
}

/// Large blocks are mapped directly (the kernel's fresh pages are zero, and are taken only when first written); small ones come
/// from the allocator.
#[cfg(target_os = "linux")]
fn allocate(layout: Layout) -> Option<NonNull<u8>> {
    if layout.size() < LARGE {
        // SAFETY: the layout has a non-zero size.
        return NonNull::new(unsafe { alloc_zeroed(layout) });
    }
    // Map one huge page too much, then give back what lies outside the aligned middle.
    let (size, align) = (layout.size().checked_next_multiple_of(HUGE_PAGE)?, layout.align());
    let mapped = size.checked_add(align)?;
    // SAFETY: a fresh private anonymous mapping touches no existing memory.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            mapped,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return None;
    }
    let base = base as usize;
    let start = base.next_multiple_of(align);
    let (head, tail) = (start - base, base + mapped - (start + size));
    // SAFETY: both ranges lie in the mapping made above and outside the block handed out; the advice is only a hint.
    unsafe {
        if head > 0 {
            libc::munmap(base as *mut _, head);
        }
        if tail > 0 {
            libc::munmap((start + size) as *mut _, tail);
        }
        libc::madvise(start as *mut _, size, libc::MADV_HUGEPAGE);
    }
    NonNull::new(start as *mut u8)
}

#[cfg(target_os = "linux")]
fn release(address: NonNull<u8>, layout: Layout) {
    // SAFETY: `address` came from `allocate` with this layout, which decides in the same way.
    unsafe {
        if layout.size() < LARGE {
            dealloc(address.as_ptr(), layout);
        } else {
            libc::munmap(address.as_ptr().cast(), layout.size().next_multiple_of(HUGE_PAGE));
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn allocate(layout: Layout) -> Option<NonNull<u8>> {
    // SAFETY: the layout has a non-zero size.
    NonNull::new(unsafe { alloc_zeroed(layout) })
}

#[cfg(not(target_os = "linux"))]
fn release(address: NonNull<u8>, layout: Layout) {
    // SAFETY: `address` came from `allocate` with this layout.
    unsafe { dealloc(address.as_ptr(), layout) }
}

/// Bytes of a `[rows, cols]` matrix, or [`Error::Memory`] where they do not fit into a `usize`.
fn matrix_bytes(dtype: DType, rows: usize, cols: usize) -> Result<usize> {
    rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.bytes())).ok_or_else(|| Error::Memory {
        device: "cpu".into(),
        sum: format!("{rows} x {cols} elements of {} bytes overflow", dtype.bytes()),
    })
}

/// A zeroed tensor in host memory.
///
/// # Errors
/// [`Error::Memory`] when the system refuses it.
pub fn tensor(dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
    let block = Block::zeroed(matrix_bytes(dtype, rows, cols)?)?;
    Ok(Tensor::new(Box::new(block), dtype, rows, cols))
}

/// [`tensor`] for weights: see [`Block::lasting`].
///
/// # Errors
/// [`Error::Memory`] when the system refuses it.
pub fn lasting_tensor(dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
    let block = Block::lasting(matrix_bytes(dtype, rows, cols)?)?;
    Ok(Tensor::new(Box::new(block), dtype, rows, cols))
}

/// A Rust type that tensors hold; any bits are a value of it.
pub trait Element: Copy + Send + Sync + Default + 'static {
    /// The tensor type of the same name.
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
impl Element for i8 {
    const DTYPE: DType = DType::I8;
}

/// A code of float8_e4m3fn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct F8(pub u8);

impl Element for F8 {
    const DTYPE: DType = DType::F8;
}

/// Two codes of 4 bits, the first in the lower ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct I4x2(pub u8);

impl Element for I4x2 {
    const DTYPE: DType = DType::I4x2;
}

/// A [`View`] of host memory as typed rows, to read from any thread.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    address: *const T,
    rows: usize,
    cols: usize,
    stride: usize,
    borrow: PhantomData<&'a [T]>,
}

// SAFETY: as good as a `&[T]`.
unsafe impl<T: Sync> Send for Rows<'_, T> {}
// SAFETY: as good as a `&[T]`.
unsafe impl<T: Sync> Sync for Rows<'_, T> {}

impl<'a, T: Element> Rows<'a, T> {
    /// Takes a view of host memory at its word. Sound because views are made by [`Tensor`] from a [`Storage`], stay inside it
    /// and borrow it, and a storage of [`DeviceId::Cpu`] must own the initialised host memory it names.
    ///
    /// # Panics
    /// When the view lies on another device or holds another type.
    pub fn new(view: View<'a>) -> Self {
        assert_eq!(view.device(), DeviceId::Cpu, "a CPU kernel got memory of another device");
        assert_eq!(view.dtype(), T::DTYPE, "a kernel got elements of another type");
        Rows {
            address: view.address() as *const T,
            rows: view.rows(),
            cols: view.cols(),
            stride: view.stride(),
            borrow: PhantomData,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }
    /// Address of element (0, 0).
    pub fn as_ptr(&self) -> *const T {
        self.address
    }

    /// One row.
    ///
    /// # Panics
    /// When there is no such row.
    #[inline]
    pub fn row(&self, row: usize) -> &'a [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: row `row` of the view's memory, borrowed for 'a.
        unsafe { std::slice::from_raw_parts(self.address.add(row * self.stride), self.cols) }
    }

    /// All elements, of a view without gaps.
    ///
    /// # Panics
    /// When the rows do not lie one after another.
    pub fn all(&self) -> &'a [T] {
        assert!(self.stride == self.cols || self.rows <= 1, "rows {} apart hold {}", self.stride, self.cols);
        // SAFETY: the view covers exactly this memory, borrowed for 'a.
        unsafe { std::slice::from_raw_parts(self.address, self.rows * self.cols) }
    }
}

/// A [`ViewMut`] of host memory as typed rows, written by several threads at once, each its own part.
pub struct RowsMut<'a, T> {
    address: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: as good as a `&mut [T]`; shared use hands out parts through unsafe functions only.
unsafe impl<T: Send> Send for RowsMut<'_, T> {}
// SAFETY: see above.
unsafe impl<T: Send + Sync> Sync for RowsMut<'_, T> {}

impl<'a, T: Element> RowsMut<'a, T> {
    /// Takes a view of host memory at its word; see [`Rows::new`].
    ///
    /// # Panics
    /// When the view lies on another device or holds another type.
    pub fn new(view: ViewMut<'a>) -> Self {
        let rows = Rows::<T>::new(view.as_view());
        RowsMut {
            address: rows.address.cast_mut(),
            rows: rows.rows,
            cols: rows.cols,
            stride: rows.stride,
            borrow: PhantomData,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }
    /// Address of element (0, 0).
    pub fn as_mut_ptr(&self) -> *mut T {
        self.address
    }

    /// Address of the first element of a row, for whoever writes elements that do not lie side by side.
    ///
    /// # Panics
    /// When there is no such row.
    #[inline]
    pub fn row_ptr(&self, row: usize) -> *mut T {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        self.address.wrapping_add(row * self.stride)
    }

    /// One row.
    ///
    /// # Panics
    /// When there is no such row.
    #[inline]
    pub fn row_mut(&mut self, row: usize) -> &mut [T] {
        // SAFETY: exclusively borrowed.
        unsafe { self.part(row, 0..self.cols) }
    }

    /// Some columns of one row, without exclusive access to the whole.
    ///
    /// # Safety
    /// Nobody else reads or writes these elements while the slice lives.
    ///
    /// # Panics
    /// When the elements are not in the matrix.
    #[inline]
    #[expect(clippy::mut_from_ref, reason = "threads write disjoint parts; the caller promises it")]
    pub unsafe fn part(&self, row: usize, cols: std::ops::Range<usize>) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        // SAFETY: inside the view's memory; exclusive by the caller's promise.
        unsafe {
            let start = self.address.add(row * self.stride + cols.start);
            std::slice::from_raw_parts_mut(start, cols.len())
        }
    }
}

/// A buffer that grows to the largest size asked for and stays: what a backend keeps between calls, so that the steady state
/// allocates nothing. Contents are left over from the last use.
#[derive(Default)]
pub struct Scratch {
    block: Mutex<Option<Block>>,
}

/// Exclusive use of a [`Scratch`].
pub struct ScratchGuard<'a> {
    block: MutexGuard<'a, Option<Block>>,
}

impl Scratch {
    /// The buffer with room for `bytes`. Waits while another thread uses it.
    ///
    /// # Errors
    /// [`Error::Memory`] when it cannot grow.
    pub fn lock(&self, bytes: usize) -> Result<ScratchGuard<'_>> {
        let mut block = self.block.lock().unwrap_or_else(PoisonError::into_inner);
        if block.as_ref().is_none_or(|b| b.bytes < bytes) {
            // Free first: both together may not fit.
            *block = None;
            *block = Some(Block::zeroed(bytes)?);
        }
        Ok(ScratchGuard { block })
    }
}

impl ScratchGuard<'_> {
    /// The buffer as elements of one type; at least as many as asked for.
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        self.block.as_mut().map_or(&mut [], Block::as_mut_slice)
    }
}

thread_local! {
    /// Free scratch buffers of this thread, the one used by the outermost borrower on top.
    static LOCAL: RefCell<Vec<Block>> = const { RefCell::new(Vec::new()) };
}

/// Lends this thread's scratch, `len` elements with left-over contents, aligned to a cache line. May be nested; a task of a
/// pool finds its worker's own. Allocates only until every depth has seen its largest size.
///
/// # Panics
/// When memory for it is refused: kernels ask for cache-sized pieces, planned for long before.
pub fn with_local_scratch<T: Element, R>(len: usize, use_it: impl FnOnce(&mut [T]) -> R) -> R {
    let bytes = len.checked_mul(size_of::<T>()).expect("scratch size overflows");
    let kept = LOCAL.with_borrow_mut(Vec::pop).filter(|b| b.bytes >= bytes);
    let mut block = kept.unwrap_or_else(|| {
        Block::zeroed(bytes.next_power_of_two()).unwrap_or_else(|e| panic!("scratch of {bytes} bytes: {e}"))
    });
    let result = use_it(&mut block.as_mut_slice()[..len]);
    LOCAL.with_borrow_mut(|free| free.push(block));
    result
}

#[cfg(test)]
mod tests;
