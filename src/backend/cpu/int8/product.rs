//! Quantised rows times one panel of weights in 8 bits, block after block of k, as [`crate::backend::cpu::tile`] does it for other types:
//! a block stays in the first-level cache while all rows pass over it, and the next one is on its way meanwhile. Sums are integers,
//! so the tile's shape cannot show in a result.

use std::ops::Range;

use super::pack::Panel;
use super::rows::QuantizedRows;
use crate::backend::cpu::panel::PANEL;
use crate::backend::cpu::simd::{Kernel, LINE, Simd};

/// Inputs that lie side by side.
const QUAD: usize = 4;
/// Quads of one block at most: 18 KiB, as large as those of other types.
const BLOCK_QUADS: usize = 96;
/// How far ahead a single strip of rows fetches weights.
const AHEAD_BYTES: usize = 8 << 10;
/// `sums[r][j] = sum_k rows[r][k] * panel[k][j]` for all columns of the panel.
pub struct PanelProduct<'a> {
    a: *const i8,
    stride: usize,
    row_sums: &'a [i32],
    panel: Panel<'a>,
    sums: &'a mut [i32],
}

impl<'a> PanelProduct<'a> {
    /// `sums` has room for `[rows, PANEL]`; only the columns of the panel are written.
    ///
    /// # Safety
    /// The rows have as many elements as the panel has k, and stay as they are meanwhile.
    pub unsafe fn new(x: QuantizedRows, rows: Range<usize>, panel: Panel<'a>, sums: &'a mut [i32]) -> Self {
        assert!(sums.len() >= rows.len() * PANEL, "{} sums for {} rows", sums.len(), rows.len());
        let (a, stride) = x.row(rows.start);
        // SAFETY: the caller's promise.
        PanelProduct { a, stride, row_sums: unsafe { x.sums(rows) }, panel, sums }
    }
}

impl Kernel for PanelProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let PanelProduct { a, stride, row_sums, panel, sums } = self;
        let rows = row_sums.len();
        let Panel { weights, columns } = panel;
        // Of like lengths: a short one would be over before all of the next is fetched.
        let quads = weights.len() / (QUAD * columns);
        let block_quads = quads.div_ceil(quads.div_ceil(BLOCK_QUADS).max(1)).max(1);
        let strips = rows.div_ceil(const { tallest::<S>() });
        for (row, &sum) in row_sums.iter().enumerate() {
            // What the instruction adds to every weight is taken off before. It may wrap, as the sum may, and both cancel.
            let from = sum.wrapping_mul(-S::QUAD_OFFSET);
            sums[row * PANEL..][..columns].fill(from);
        }
        for (number, block) in weights.chunks(block_quads * QUAD * columns).enumerate() {
            let share = block_quads.div_ceil(strips.max(1)) * QUAD * columns;
            let mut row = 0;
            for strip in 0..strips {
                // Of like heights: a strip of one row waits for its own sums.
                let height = (rows - row).div_ceil(strips - strip);
                let ahead = if strips == 1 { AHEAD_BYTES } else { block.len() + strip * share };
                // SAFETY: rows [row, row + height) and this block's k of them exist, by the promise to `new`; so do their sums.
                unsafe {
                    let a = a.add(row * stride + number * block_quads * QUAD);
                    let block = Block { weights: block, columns, ahead, every: strips };
                    self::strip::<S>(simd, (a, stride, height), block, sums.as_mut_ptr().add(row * PANEL));
                }
                row += height;
            }
        }
    }
}

/// Some k of a panel.
#[derive(Clone, Copy)]
struct Block<'a> {
    weights: &'a [i8],
    columns: usize,
    /// Bytes from the first weight in use to the first one to fetch.
    ahead: usize,
    /// Quads from one fetch to the next.
    every: usize,
}

/// A strip of [`tallest`] rows at most times one block.
#[inline(always)]
unsafe fn strip<S: Simd>(
    simd: S,
    (a, stride, rows): (*const i8, usize, usize),
    block: Block<'_>,
    sums: *mut i32,
) {
    let a = (a, stride);
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match rows {
            1 => tiles::<S, 1>(simd, a, block, sums),
            2 => tiles::<S, 2>(simd, a, block, sums),
            3 => tiles::<S, 3>(simd, a, block, sums),
            4 => tiles::<S, 4>(simd, a, block, sums),
            5 => tiles::<S, 5>(simd, a, block, sums),
            6 => tiles::<S, 6>(simd, a, block, sums),
            7 => tiles::<S, 7>(simd, a, block, sums),
            _ => tiles::<S, 8>(simd, a, block, sums),
        }
    }
}

/// Sums, weights and an activation fit into the registers, and what multiplying takes besides.
const fn fits<S: Simd>(rows: usize, vectors: usize) -> bool {
    vectors * (rows + 1) + 4 <= S::REGISTERS
}

/// Rows of the tallest strip: as many, up to 8, as leave a tile two vectors wide, so that each activation read is used twice.
const fn tallest<S: Simd>() -> usize {
    let mut rows = 8;
    while rows > 1 && !fits::<S>(rows, 2) {
        rows -= 1;
    }
    rows
}

/// R rows, in tiles as wide as registers allow.
#[inline(always)]
unsafe fn tiles<S: Simd, const R: usize>(simd: S, a: (*const i8, usize), block: Block<'_>, sums: *mut i32) {
    let vectors = block.columns / S::LANES;
    // SAFETY: the caller's promise, passed on.
    unsafe {
        if const { fits::<S>(R, 3) } && vectors.is_multiple_of(3) {
            row_of_tiles::<S, R, 3>(simd, a, block, sums);
        } else if const { fits::<S>(R, 2) } && vectors.is_multiple_of(2) {
            row_of_tiles::<S, R, 2>(simd, a, block, sums);
        } else {
            row_of_tiles::<S, R, 1>(simd, a, block, sums);
        }
    }
}

/// R rows times all columns of the panel, V vectors at a time.
#[inline(always)]
unsafe fn row_of_tiles<S: Simd, const R: usize, const V: usize>(
    simd: S,
    (a, stride): (*const i8, usize),
    block: Block<'_>,
    sums: *mut i32,
) {
    let Block { weights, columns, ahead, every } = block;
    let quads = weights.len() / (QUAD * columns);
    for column in (0..columns).step_by(V * S::LANES) {
        // SAFETY: the caller vouches for R rows of activations and sums; the columns are in the panel.
        unsafe {
            let sums = sums.add(column);
            let mut acc = [[simd.splat_int(0); V]; R];
            for (r, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = simd.load_ints(sums.add(r * PANEL + v * S::LANES));
                }
            }
            let (mut quad, mut next) = (0, weights.as_ptr().wrapping_add(ahead + column * QUAD));
            while quad < quads {
                for line in 0..V * S::LANES * QUAD / LINE {
                    simd.prefetch_once(next.wrapping_add(line * LINE).cast());
                }
                next = next.wrapping_add(QUAD * columns);
                let end = quads.min(quad + every);
                while quad < end {
                    let w = weights.as_ptr().add((quad * columns + column) * QUAD);
                    let a = a.add(quad * QUAD);
                    step::<S, R, V>(simd, &mut acc, (a, stride), w);
                    quad += 1;
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                for (v, &acc) in acc.iter().enumerate() {
                    simd.store_ints(sums.add(r * PANEL + v * S::LANES), acc);
                }
            }
        }
    }
}

/// `acc[r][v] += a[r] * w[v]`, for one quad of R rows and of V vectors of columns.
#[inline(always)]
unsafe fn step<S: Simd, const R: usize, const V: usize>(
    simd: S,
    acc: &mut [[S::Ints; V]; R],
    (a, stride): (*const i8, usize),
    w: *const i8,
) {
    // SAFETY: the caller's promise; a quad is 32 bits.
    unsafe {
        let mut quads = [simd.splat_quad(0); V];
        for (v, quads) in quads.iter_mut().enumerate() {
            *quads = simd.load_quads(w.add(v * S::LANES * QUAD));
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            let a = simd.splat_quad(a.add(r * stride).cast::<u32>().read_unaligned());
            for (acc, &w) in acc.iter_mut().zip(&quads) {
                *acc = simd.dot_quads(*acc, a, w);
            }
        }
    }
}
