//! Rows of activations in 8 bits, each with its scale.

use std::ops::Range;

use crate::backend::cpu::CpuBackend;
use crate::backend::cpu::rows::load_next;
use crate::backend::cpu::simd::{Float, Kernel, LINE, Simd};
use crate::backend::int8::Scale;

/// Elements quantised by one task; fewer stay on the calling thread.
const TASK_ELEMENTS: usize = 1 << 15;
/// Some rows in memory of the caller's, to be written and read by many threads.
#[derive(Clone, Copy)]
pub struct QuantizedRows {
    scales: *mut f32,
    /// Sum of each row's integers, which [`Simd::QUAD_OFFSET`] asks for.
    sums: *mut i32,
    start: *mut i8,
    stride: usize,
    rows: usize,
}

// SAFETY: plain addresses; whoever follows them answers for it.
unsafe impl Send for QuantizedRows {}
// SAFETY: see above.
unsafe impl Sync for QuantizedRows {}

impl QuantizedRows {
    /// Bytes from one row to the next: an odd number of cache lines, so that rows do not compete for the same places of the cache.
    fn stride(width: usize) -> usize {
        (width.div_ceil(LINE) | 1) * LINE
    }

    /// Scales, then sums, in whole cache lines each.
    fn numbers(rows: usize) -> usize {
        rows.next_multiple_of(LINE / 4)
    }

    /// Bytes of so many rows.
    pub fn bytes(rows: usize, width: usize) -> usize {
        2 * 4 * Self::numbers(rows) + rows * Self::stride(width)
    }

    /// Rows of up to `width` elements in `memory`, valid as long as that is.
    ///
    /// # Panics
    /// When it has fewer than [`QuantizedRows::bytes`].
    pub fn new(memory: &mut [i32], rows: usize, width: usize) -> QuantizedRows {
        let bytes = Self::bytes(rows, width);
        assert!(size_of_val(memory) >= bytes, "{} bytes of {bytes} for rows", size_of_val(memory));
        let numbers = Self::numbers(rows);
        let start = memory.as_mut_ptr();
        QuantizedRows {
            scales: start.cast(),
            sums: start.wrapping_add(numbers),
            start: start.wrapping_add(2 * numbers).cast(),
            stride: Self::stride(width),
            rows,
        }
    }

    /// Quantises `row(r)` into each row r, on the backend's threads.
    ///
    /// # Safety
    /// The memory is still there, nobody else touches it meanwhile, and no row is wider than was said.
    pub unsafe fn fill<'a, T: Float>(self, backend: &CpuBackend, row: impl Fn(usize) -> &'a [T] + Sync) {
        let rows_per_task = TASK_ELEMENTS.div_ceil(self.stride);
        let this = &self;
        backend.pool().run(self.rows.div_ceil(rows_per_task), &|task| {
            for r in task * rows_per_task..this.rows.min((task + 1) * rows_per_task) {
                // SAFETY: row r, which no other task touches; the rest is the caller's promise.
                unsafe { this.quantize(backend, r, row(r)) };
            }
        });
    }

    /// Quantises `from` into row `row`.
    ///
    /// # Safety
    /// The memory is still there, and nobody else touches this row meanwhile.
    pub unsafe fn quantize<T: Float>(self, backend: &CpuBackend, row: usize, from: &[T]) {
        let QuantizedRows { scales, sums, start, stride, rows } = self;
        assert!(row < rows && from.len() <= stride, "row {row} of {rows}: {} of {stride}", from.len());
        // SAFETY: a row that exists, its scale and its sum, by the caller's promise our own.
        unsafe {
            let to = std::slice::from_raw_parts_mut(start.add(row * stride), stride);
            let (scale, sum) = backend.dispatch(Quantize { from, to });
            *scales.add(row) = scale;
            *sums.add(row) = sum;
        }
    }

    /// Address of the first element of a row; rows are this many bytes apart.
    pub fn row(self, row: usize) -> (*const i8, usize) {
        (self.start.wrapping_add(row * self.stride), self.stride)
    }

    /// The scales of some rows.
    ///
    /// # Safety
    /// The memory is still there for `'a`, and nobody writes it meanwhile.
    pub unsafe fn scales<'a>(self, rows: Range<usize>) -> &'a [f32] {
        assert!(rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        // SAFETY: as many as there are rows; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.scales.add(rows.start), rows.len()) }
    }

    /// The sums of some rows.
    ///
    /// # Safety
    /// As [`QuantizedRows::scales`].
    pub unsafe fn sums<'a>(self, rows: Range<usize>) -> &'a [i32] {
        assert!(rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        // SAFETY: as many as there are rows; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.sums.add(rows.start), rows.len()) }
    }
}

/// The next vector of a row, zero beyond its end.
#[inline(always)]
fn next<S: Simd, T: Float>(simd: S, row: &[T]) -> S::V {
    // SAFETY: the row has these elements.
    unsafe { load_next(simd, row.as_ptr(), row.len()) }
}

/// [`crate::backend::int8::quantize`] with vectors. Returns the scale and the sum of the integers.
pub struct Quantize<'a, T> {
    pub from: &'a [T],
    /// Whole cache lines; what lies in the last one beyond the row becomes zero up to a whole vector.
    pub to: &'a mut [i8],
}

impl<T: Float> Kernel for Quantize<'_, T> {
    type Output = (f32, i32);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> (f32, i32) {
        let Quantize { from, to } = self;
        let whole = from.len().next_multiple_of(S::LANES);
        assert!(to.len() >= whole, "{} bytes for {whole}", to.len());
        let mut greatest = simd.zero();
        // Zero times what is not finite is NaN, and stays so in a sum.
        let mut poison = simd.zero();
        for at in (0..from.len()).step_by(S::LANES) {
            let v = next(simd, &from[at..]);
            let magnitude = simd.max(v, simd.sub(simd.zero(), v));
            greatest = simd.max(magnitude, greatest);
            poison = simd.add(poison, simd.mul(v, simd.zero()));
        }
        let all_finite = simd.sum(poison) == 0.0;
        let Scale { scale, inverse } = Scale::of(simd.max_lane(greatest), all_finite);
        let inverse = simd.splat(inverse);
        let mut sums = simd.zero();
        for at in (0..from.len()).step_by(S::LANES) {
            let v = simd.round(simd.mul(next(simd, &from[at..]), inverse));
            sums = simd.add(sums, v);
            // SAFETY: `to` has room for whole vectors.
            unsafe { simd.store_i8(to.as_mut_ptr().add(at), v) };
        }
        // Exact: a lane's sum is far below 2^24.
        let sum = simd.to_array(sums).iter().map(|&sum| sum as i32).sum();
        (scale, sum)
    }
}
