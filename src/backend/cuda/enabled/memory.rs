//! Device memory: tensors, buffers that grow, and the pinned ring through which small host arrays reach the device.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::ffi;
use super::gpu::Gpu;
use crate::backend::{DType, DeviceId, Storage, Tensor, View, ViewMut};
use crate::error::{Error, Result};

/// A zeroed tensor. Zeroing runs in the stream of `gpu`.
pub fn tensor(gpu: &Arc<Gpu>, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
    let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.bytes()));
    let bytes = bytes.ok_or_else(|| gpu.failure(format!("a tensor of {rows} x {cols} elements")))?;
    let memory = DeviceMemory::new(gpu, bytes)?;
    memory.zero()?;
    Ok(Tensor::new(Box::new(memory), dtype, rows, cols))
}

/// A block of device memory.
pub struct DeviceMemory {
    gpu: Arc<Gpu>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl DeviceMemory {
    /// At least one byte, uninitialised.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<DeviceMemory> {
        gpu.enter()?;
        // SAFETY: a size above 0 in a current context.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(address) => Ok(DeviceMemory { gpu: Arc::clone(gpu), address, bytes }),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(Error::Memory {
                device: format!("cuda:{}", gpu.info().ordinal),
                sum: format!("{bytes} bytes more > {} available", gpu.free_memory()?),
            }),
            Err(error) => gpu.driver("allocating", Err(error)),
        }
    }

    pub fn address(&self) -> usize {
        self.address as usize
    }

    fn zero(&self) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        self.gpu.enter()?;
        let stream = self.gpu.stream()?;
        // SAFETY: the block is `bytes` long.
        let done = unsafe { result::memset_d8_async(self.address, 0, self.bytes, stream) };
        self.gpu.driver("zeroing", done)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // Other ranks' streams may still read it. Freeing happens when buffers grow and at the end, never in a step.
        // A GPU in error frees its memory with the process.
        if self.gpu.come_to_rest().is_ok() {
            // SAFETY: allocated above, and nothing runs that could use it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

impl Storage for DeviceMemory {
    fn address(&self) -> usize {
        self.address as usize
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
    fn device(&self) -> DeviceId {
        DeviceId::Cuda(self.gpu.info().ordinal)
    }
}

/// Working memory that grows and is kept.
#[derive(Default)]
pub struct Buffer {
    tensor: Option<Tensor>,
}

impl Buffer {
    /// `[rows, cols]` of uninitialised elements, valid until the next call.
    pub fn take(&mut self, gpu: &Arc<Gpu>, dtype: DType, rows: usize, cols: usize) -> Result<ViewMut<'_>> {
        let elements = rows * cols;
        let fits = |t: &Tensor| t.dtype() == dtype && t.cols() >= elements;
        if !self.tensor.as_ref().is_some_and(fits) {
            self.tensor = None;
            self.tensor = Some(tensor(gpu, dtype, 1, elements.next_power_of_two())?);
        }
        Ok(self.tensor.as_mut().expect("made above").reshaped_mut(rows, cols))
    }
}

/// Bytes of the ring at first, on the host and on the device.
const RING: usize = 16 << 20;
/// No array may take more of the ring than one in this many parts, so that those of one kernel never meet.
const SHARE: usize = 4;
const ALIGN: usize = 256;

/// A ring of pinned host memory with a twin on the device. Host arrays are copied into it, and from there asynchronously to the
/// device; a region is written again only after the stream has passed everything that used it.
pub struct Staging {
    gpu: Arc<Gpu>,
    pinned: Pinned,
    twin: DeviceMemory,
    next: usize,
}

/// Host memory that the device reads and writes directly.
struct Pinned {
    gpu: Arc<Gpu>,
    start: *mut u8,
    bytes: usize,
}

impl Pinned {
    fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Pinned> {
        gpu.enter()?;
        // SAFETY: a size above 0 in a current context.
        let start = gpu.driver("pinning host memory", unsafe { result::malloc_host(bytes, 0) })?;
        Ok(Pinned { gpu: Arc::clone(gpu), start: start.cast(), bytes })
    }

    fn region(&mut self, at: usize, bytes: usize) -> &mut [u8] {
        assert!(at + bytes <= self.bytes, "{at} + {bytes} of {} pinned bytes", self.bytes);
        // SAFETY: within the allocation, which this value owns; the caller knows that nothing in flight uses the region.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.synchronize().is_ok() {
            // SAFETY: allocated in `new`; the stream has passed everything that used it.
            let _ = unsafe { result::free_host(self.start.cast()) };
        }
    }
}

// SAFETY: the pinned memory belongs to this value alone.
unsafe impl Send for Pinned {}

impl Staging {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Staging> {
        let (pinned, twin) = (Pinned::new(gpu, RING)?, DeviceMemory::new(gpu, RING)?);
        Ok(Staging { gpu: Arc::clone(gpu), pinned, twin, next: 0 })
    }

    /// Bytes of a piece of something larger.
    pub fn piece(&self) -> usize {
        self.pinned.bytes / SHARE
    }

    /// A free region; its offset.
    fn reserve(&mut self, bytes: usize) -> Result<usize> {
        if bytes > self.piece() {
            self.gpu.synchronize()?;
            let size = (bytes * SHARE).next_power_of_two();
            self.pinned = Pinned::new(&self.gpu, size)?;
            self.twin = DeviceMemory::new(&self.gpu, size)?;
            self.next = 0;
        }
        if self.next + bytes > self.pinned.bytes {
            self.gpu.synchronize()?;
            self.next = 0;
        }
        let at = self.next;
        self.next = (at + bytes).next_multiple_of(ALIGN);
        Ok(at)
    }

    /// Device address of a copy of `bytes`, valid for work given to the stream before the ring comes round.
    pub fn push(&mut self, bytes: &[u8]) -> Result<usize> {
        let at = self.reserve(bytes.len())?;
        let to = self.twin.address() + at;
        self.send_region(at, bytes, to)?;
        Ok(to)
    }

    /// Copies `bytes` to device memory, after everything given to the stream before.
    pub fn send(&mut self, bytes: &[u8], to: usize) -> Result<()> {
        self.gpu.flush()?;
        self.send_beside_step(bytes, to)
    }

    /// [`Staging::send`] into memory that nothing reads that was put off.
    fn send_beside_step(&mut self, bytes: &[u8], to: usize) -> Result<()> {
        let mut done = 0;
        for chunk in bytes.chunks(self.piece()) {
            let at = self.reserve(chunk.len())?;
            self.send_region(at, chunk, to + done)?;
            done += chunk.len();
        }
        Ok(())
    }

    fn send_region(&mut self, at: usize, bytes: &[u8], to: usize) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.gpu.enter()?;
        let region = self.pinned.region(at, bytes.len());
        region.copy_from_slice(bytes);
        let stream = self.gpu.stream_beside_step();
        // SAFETY: `reserve` gave this region, which is not written before the stream has passed the copy; `to` is device memory
        // of that size.
        let sent = unsafe { result::memcpy_htod_async(to as sys::CUdeviceptr, region, stream) };
        self.gpu.driver("copying to it", sent)
    }

    /// Copies contiguous device memory into `bytes`, after everything given to the stream before.
    pub fn receive(&mut self, from: usize, bytes: &mut [u8]) -> Result<()> {
        let mut done = 0;
        for chunk in bytes.chunks_mut(self.piece()) {
            let at = self.reserve(chunk.len())?;
            self.gpu.enter()?;
            let region = self.pinned.region(at, chunk.len());
            let source = (from + done) as sys::CUdeviceptr;
            let stream = self.gpu.stream()?;
            // SAFETY: as in `send_region`, the other way; the region is read after the copy has ended.
            let got = unsafe { result::memcpy_dtoh_async(region, source, stream) };
            self.gpu.driver("copying from it", got)?;
            self.gpu.synchronize()?;
            chunk.copy_from_slice(region);
            done += chunk.len();
        }
        Ok(())
    }

    /// A region of the device twin as a matrix.
    fn twin_matrix(&mut self, dtype: DType, rows: usize, cols: usize) -> Result<ffi::Matrix> {
        let at = self.reserve(rows * cols * dtype.bytes())?;
        Ok(ffi::Matrix {
            data: self.twin.address() + at,
            stride: cols as i64,
            rows: ffi::int(rows),
            cols: ffi::int(cols),
            dtype: ffi::type_code(dtype),
            reserved: 0,
        })
    }
}

/// Row-major host elements and how they go into device memory.
pub struct Upload<'a> {
    pub bytes: &'a [u8],
    /// Type of the host elements; the destination may have another.
    pub dtype: DType,
    /// Where row i goes: see `MoeyardCopy`.
    pub half: Option<u8>,
}

/// Copies `upload.bytes`, `[dst.rows, dst.cols]`, into `dst`, converted.
pub fn upload(gpu: &Gpu, staging: &mut Staging, upload: Upload<'_>, dst: ffi::Matrix) -> Result<()> {
    let (rows, cols) = (dst.rows as usize, dst.cols as usize);
    let row_bytes = cols * upload.dtype.bytes();
    if rows == 0 || row_bytes == 0 {
        return Ok(());
    }
    let same_type = dst.dtype == ffi::type_code(upload.dtype);
    if upload.half.is_none() && same_type && (dst.stride as usize == cols || rows == 1) {
        return staging.send(upload.bytes, dst.data);
    }
    // Groups of eight rows stay together when they are interleaved.
    let step = (staging.piece() / row_bytes / 8 * 8).max(8);
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first);
        let bytes = &upload.bytes[first * row_bytes..][..count * row_bytes];
        let data = staging.push(bytes)?;
        let src = ffi::Matrix {
            data,
            stride: cols as i64,
            rows: ffi::int(count),
            cols: dst.cols,
            dtype: ffi::type_code(upload.dtype),
            reserved: 0,
        };
        let target = if upload.half.is_some() { first * 2 } else { first };
        let element = if dst.dtype == ffi::type_code(DType::Bf16) { 2 } else { 4 };
        let args = ffi::Copy {
            src,
            dst: ffi::Matrix { data: dst.data + target * dst.stride as usize * element, ..dst },
            index: 0,
            rows: ffi::int(count),
            half: upload.half.map_or(-1, i32::from),
        };
        gpu.launch("upload", ffi::moeyard_copy, &args)?;
    }
    Ok(())
}

/// Copies a view into row-major host bytes.
pub fn download(gpu: &Gpu, staging: &mut Staging, src: View<'_>, bytes: &mut [u8]) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    if src.is_contiguous() {
        return staging.receive(src.address(), bytes);
    }
    let row_bytes = src.cols() * src.dtype().bytes();
    let step = (staging.piece() / row_bytes).max(1);
    for first in (0..src.rows()).step_by(step) {
        let rows = first..src.rows().min(first + step);
        let part = src.rows_range(rows.clone());
        let dst = staging.twin_matrix(src.dtype(), rows.len(), src.cols())?;
        let args =
            ffi::Copy { src: ffi::Matrix::of(&part), dst, index: 0, rows: ffi::int(rows.len()), half: -1 };
        gpu.launch("download", ffi::moeyard_copy, &args)?;
        staging.receive(dst.data, &mut bytes[first * row_bytes..rows.end * row_bytes])?;
    }
    Ok(())
}

/// A host array that rarely changes and stays on the device until it does, at one address while it fits.
#[derive(Default)]
pub struct Resident {
    bytes: Vec<u8>,
    memory: Option<DeviceMemory>,
    /// The sequence of launches that were put off and may read it.
    reader: Option<u64>,
}

/// Bytes of a resident at first.
const RESIDENT: usize = 4096;

impl Resident {
    /// Device address of a copy of `bytes`. The old content may still be read by work given to the stream before.
    pub fn put(&mut self, gpu: &Arc<Gpu>, staging: &mut Staging, bytes: &[u8]) -> Result<usize> {
        let sequence = gpu.open_sequence();
        if self.memory.is_none() || self.bytes != bytes {
            if sequence.is_some() && self.reader == sequence {
                gpu.flush()?;
            }
            if self.memory.as_ref().is_none_or(|m| m.bytes() < bytes.len()) {
                self.memory = None;
                self.memory = Some(DeviceMemory::new(gpu, bytes.len().next_power_of_two().max(RESIDENT))?);
            }
            let memory = self.memory.as_ref().expect("made above");
            staging.send_beside_step(bytes, memory.address())?;
            self.bytes.clear();
            self.bytes.extend_from_slice(bytes);
        }
        self.reader = gpu.open_sequence();
        Ok(self.memory.as_ref().expect("made above").address())
    }
}
