//! Softmax attention of some query heads over cached latents in place, which are keys (rotary part included) and values
//! of all heads at once: the core of the absorbed form of MLA.
//!
//! Two passes: all scores of a row, their exact maximum and sum, then the weighted latents in ascending position. Each
//! row touches exactly the positions it sees, in an order that depends on them alone; rows of a tile share loads, never
//! sums. So a row's bits do not depend on the tile, the chunk, the block size or the batch.

use std::ops::Range;

use super::memory::Rows;
use super::simd::{Float, Kernel, MAX_LANES, Simd, exp};
use super::tiles::{Strided, accumulate, dots};

/// Most rows of a tile: their scores stay in the second-level cache for a context of some thousand tokens, while keys
/// and values are read once for all.
pub(super) const MAX_TILE_ROWS: usize = 16;

/// The cached latents of one sequence: rows of a latent and, behind it, a rotary key.
pub(super) struct LatentContext<'a, T> {
    pub(super) cache: Rows<'a, T>,
    /// The sequence's blocks.
    pub(super) table: &'a [u32],
    pub(super) block_size: usize,
}

impl<T: Float> LatentContext<'_, T> {
    /// The rows of block `index`.
    #[inline(always)]
    fn block(&self, index: usize) -> Strided<T> {
        Strided::from(&self.cache, self.table[index] as usize * self.block_size, 0)
    }
}

/// Shape of the work on one sequence. Queries are numbered row by row: number `i` is head `i % heads` of row `i / heads`.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// Query heads.
    pub(super) heads: usize,
    /// Rows of the sequence.
    pub(super) rows: usize,
    /// Position of the first row.
    pub(super) position: usize,
    /// Scores are multiplied by this.
    pub(super) scale: f32,
    /// Tokens per block.
    pub(super) block_size: usize,
    /// Width of a key: a multiple of the largest register, as all widths here.
    pub(super) key_width: usize,
    /// Width of a value.
    pub(super) value_width: usize,
}

impl Shape {
    /// Queries in all.
    pub(super) fn queries(&self) -> usize {
        self.rows * self.heads
    }

    /// How many positions query `i` sees: all up to its own.
    fn seen(&self, i: usize) -> usize {
        self.position + i / self.heads + 1
    }

    /// Elements from one query's scores to the next one's: with room for a whole register behind the last.
    fn score_stride(&self, queries: &Range<usize>) -> usize {
        self.seen(queries.end - 1) + MAX_LANES
    }

    /// Elements of the scratch of one tile.
    pub(super) fn scratch(&self, queries: &Range<usize>) -> usize {
        queries.len() * (self.key_width + self.value_width + self.score_stride(queries))
    }
}

/// Queries per tile: fewer than the most where there would be too few tiles for the threads.
pub(super) fn tile_rows(threads: usize, queries: usize) -> usize {
    let mut rows = MAX_TILE_ROWS;
    while rows > 4 && queries.div_ceil(rows) < 4 * threads {
        rows /= 2;
    }
    rows
}

/// A tile's queries and outputs: the scratch of [`Shape::scratch`], divided.
pub(super) struct TileScratch<'a> {
    /// `[queries, key_width]`, padded with zeros.
    pub(super) q: &'a mut [f32],
    /// `[queries, value_width]`
    pub(super) out: &'a mut [f32],
    scores: &'a mut [f32],
}

impl<'a> TileScratch<'a> {
    /// Divides a scratch. What `q` and `out` hold is left over from other uses.
    pub(super) fn new(shape: &Shape, queries: &Range<usize>, scratch: &'a mut [f32]) -> Self {
        let (q, rest) = scratch.split_at_mut(queries.len() * shape.key_width);
        let (out, scores) = rest.split_at_mut(queries.len() * shape.value_width);
        TileScratch { q, out, scores }
    }
}

/// Attention of some consecutive queries: from `scratch.q` to `scratch.out`, which it returns.
pub(super) struct Attend<'a, T> {
    pub(super) shape: Shape,
    pub(super) queries: Range<usize>,
    pub(super) context: &'a LatentContext<'a, T>,
    pub(super) scratch: TileScratch<'a>,
}

impl<'a, T: Float> Kernel for Attend<'a, T> {
    type Output = &'a [f32];
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) -> &'a [f32] {
        self.scores(simd);
        self.scratch.out.fill(0.0);
        let stride = self.shape.score_stride(&self.queries);
        for r in 0..self.queries.len() {
            // The weights end up divided by their sum, so the values' sum is the result.
            let seen = self.seen(r);
            softmax(simd, &mut self.scratch.scores[r * stride..][..stride], seen);
        }
        self.values(simd);
        self.scratch.out
    }
}

impl<T: Float> Attend<'_, T> {
    /// How many positions row `r` of the tile sees.
    #[inline(always)]
    fn seen(&self, r: usize) -> usize {
        self.shape.seen(self.queries.start + r)
    }

    /// The blocks that the tile sees: of each its number and its positions.
    #[inline(always)]
    fn blocks(&self) -> impl Iterator<Item = (usize, Range<usize>)> + use<T> {
        let (seen, size) = (self.seen(self.queries.len() - 1), self.shape.block_size);
        (0..seen.div_ceil(size)).map(move |b| (b, b * size..seen.min((b + 1) * size)))
    }

    /// Rows `r..r + n` of the tile, `n` at most 4.
    #[inline(always)]
    fn quads(&self) -> impl Iterator<Item = (usize, usize)> + use<T> {
        let rows = self.queries.len();
        (0..rows).step_by(4).map(move |r| (r, (rows - r).min(4)))
    }

    /// Scores of all rows. A few of four rows are computed past what a row sees; nobody reads them.
    #[inline(always)]
    fn scores<S: Simd>(&mut self, simd: S) {
        let (stride, width) = (self.shape.score_stride(&self.queries), self.shape.key_width);
        let q = Strided { start: self.scratch.q.as_ptr(), stride: width };
        let out = self.scratch.scores.as_mut_ptr();
        for (b, positions) in self.blocks() {
            let keys = self.context.block(b);
            for (r, n) in self.quads() {
                let seen = positions.start..positions.end.min(self.seen(r + n - 1));
                if seen.is_empty() {
                    continue;
                }
                // SAFETY: tokens of this block that a query of the tile sees; the scratch was divided for this shape.
                unsafe {
                    let out = out.add(r * stride + seen.start);
                    dots(simd, (q.skip(r), n), (keys, seen.len(), width), self.shape.scale, (out, stride));
                }
            }
        }
    }

    /// Weighted values of all rows, in ascending position. Positions that a few rows all see they share.
    #[inline(always)]
    fn values<S: Simd>(&mut self, simd: S) {
        for (b, positions) in self.blocks() {
            let values = self.context.block(b);
            for (r, n) in self.quads() {
                let shared = self.seen(r);
                self.add(simd, (r, n), positions.start..positions.end.min(shared), values);
                for r in r + 1..r + n {
                    let start = positions.start.max(shared);
                    let own = start..positions.end.min(self.seen(r));
                    let skipped = start - positions.start;
                    // SAFETY: no further than the block's end.
                    self.add(simd, (r, 1), own, unsafe { values.skip(skipped.min(self.shape.block_size)) });
                }
            }
        }
    }

    /// Adds the values of some positions, which start at `values`, to rows `r..r + n`.
    #[inline(always)]
    fn add<S: Simd>(&mut self, simd: S, (r, n): (usize, usize), seen: Range<usize>, values: Strided<T>) {
        if seen.is_empty() {
            return;
        }
        let (stride, width) = (self.shape.score_stride(&self.queries), self.shape.value_width);
        // SAFETY: tokens of one block that a query of the tile sees; the scratch was divided for this shape.
        unsafe {
            let p = Strided { start: self.scratch.scores.as_ptr().add(r * stride + seen.start), stride };
            let out = self.scratch.out.as_mut_ptr().add(r * width);
            accumulate(simd, (p, n), (values, seen.len()), (out, width));
        }
    }
}

/// The softmax of the first `len` elements of `x` in place. `x` has room for a whole register behind them.
#[inline(always)]
fn softmax<S: Simd>(simd: S, x: &mut [f32], len: usize) {
    let end = len.next_multiple_of(S::LANES);
    x[len..end].fill(f32::NEG_INFINITY);
    let x = &mut x[..end];
    let start = x.as_mut_ptr();
    let mut max = simd.splat(f32::NEG_INFINITY);
    let mut sum = simd.zero();
    // SAFETY: whole registers inside `x`.
    unsafe {
        for i in (0..end).step_by(S::LANES) {
            max = simd.max(simd.load(start.add(i)), max);
        }
        let max = simd.splat(simd.max_lane(max));
        for i in (0..end).step_by(S::LANES) {
            let e = exp(simd, simd.sub(simd.load(start.add(i)), max));
            simd.store(start.add(i), e);
            sum = simd.add(sum, e);
        }
        let factor = simd.splat(1.0 / simd.sum(sum));
        for i in (0..end).step_by(S::LANES) {
            simd.store(start.add(i), simd.mul(simd.load(start.add(i)), factor));
        }
    }
}
