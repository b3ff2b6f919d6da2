//! Matrices stored as floating point.

use half::{bf16, f16};
use safetensors::Dtype;
use std::ops::Range;

// Stored elements are little endian and are copied as they are.
const _: () = assert!(cfg!(target_endian = "little"), "checkpoints are read on little-endian machines only");

/// Floating-point element types of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Float {
    /// The type of this name, unless it is not one of the three.
    pub fn of(dtype: Dtype) -> Option<Float> {
        match dtype {
            Dtype::F32 => Some(Float::F32),
            Dtype::F16 => Some(Float::F16),
            Dtype::BF16 => Some(Float::Bf16),
            _ => None,
        }
    }

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::F16 | Float::Bf16 => 2,
        }
    }

    /// Element `i` of `bytes`, exactly.
    pub fn get(self, bytes: &[u8], i: usize) -> f32 {
        let two = || [bytes[2 * i], bytes[2 * i + 1]];
        match self {
            Float::F32 => f32::from_bits(super::word(bytes, i)),
            Float::F16 => f16::from_le_bytes(two()).to_f32(),
            Float::Bf16 => bf16::from_le_bytes(two()).to_f32(),
        }
    }

    /// All elements of `bytes`, exactly.
    ///
    /// # Panics
    /// When `out` has another length.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.bytes(), "bytes for {} elements", out.len());
        match self {
            Float::F32 => bytemuck::cast_slice_mut(out).copy_from_slice(bytes),
            Float::F16 => {
                for (out, two) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = f16::from_le_bytes(*two).to_f32();
                }
            }
            Float::Bf16 => {
                for (out, two) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = bf16::from_le_bytes(*two).to_f32();
                }
            }
        }
    }
}

/// Floating-point elements at regular distances: element (row, col) is number `first + row * row_stride + col *
/// col_stride` of the tensor. Serves out x in, in x out and interleaved layouts.
#[derive(Debug, Clone, Copy)]
pub struct Plain<'a> {
    /// The whole tensor.
    pub bytes: &'a [u8],
    /// Its element type.
    pub float: Float,
    /// Index of element (0, 0).
    pub first: usize,
    /// Elements from one output to the next.
    pub row_stride: usize,
    /// Elements from one input to the next.
    pub col_stride: usize,
}

/// Rows read together where a row's elements lie apart, so that each cache line is used by several of them.
const ROW_TILE: usize = 32;

impl<'a> Plain<'a> {
    /// A contiguous `[n, k]` matrix that starts at element `first`.
    pub fn rows_of(bytes: &'a [u8], float: Float, first: usize, k: usize) -> Plain<'a> {
        Plain { bytes, float, first, row_stride: k, col_stride: 1 }
    }

    /// Writes the block, row-major.
    pub fn block(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let width = cols.len();
        if self.col_stride == 1 {
            for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
                self.float.widen(self.run(row, cols.clone()), out);
            }
            return;
        }
        for tile in (0..rows.len()).step_by(ROW_TILE) {
            let end = (tile + ROW_TILE).min(rows.len());
            for (c, col) in cols.clone().enumerate() {
                for r in tile..end {
                    let at = self.first + (rows.start + r) * self.row_stride + col * self.col_stride;
                    out[r * width + c] = self.float.get(self.bytes, at);
                }
            }
        }
    }

    /// Copies the block without a detour through f32, where it is stored as contiguous bfloat16 rows; else `false`.
    pub fn copy_bf16(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [bf16]) -> bool {
        if self.float != Float::Bf16 || self.col_stride != 1 {
            return false;
        }
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
            bytemuck::cast_slice_mut(out).copy_from_slice(self.run(row, cols.clone()));
        }
        true
    }

    /// The block where it is, if it is stored as bfloat16, row after row.
    pub fn bf16_in_place(&self, rows: Range<usize>, cols: Range<usize>) -> Option<&'a [bf16]> {
        let whole = self.col_stride == 1 && self.row_stride == cols.len();
        if self.float != Float::Bf16 || !whole {
            return None;
        }
        let (start, size) = (self.first + rows.start * self.row_stride, self.float.bytes());
        // A file may put a tensor at any byte.
        bytemuck::try_cast_slice(&self.bytes[start * size..][..rows.len() * cols.len() * size]).ok()
    }

    /// Bytes of some contiguous columns of a row.
    fn run(&self, row: usize, cols: Range<usize>) -> &'a [u8] {
        let start = self.first + row * self.row_stride + cols.start;
        let size = self.float.bytes();
        &self.bytes[start * size..(start + cols.len()) * size]
    }
}
