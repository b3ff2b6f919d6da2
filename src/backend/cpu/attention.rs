//! Softmax attention of a tile of query rows over paged keys and values: the core of GQA and of both MLA forms.
//!
//! Two passes: all scores of a row, their exact maximum and sum, then the weighted values in ascending position. Each
//! row touches exactly the positions it sees, in an order that depends on them alone; rows of a tile share loads, never
//! sums. So a row's bits do not depend on the tile, the chunk, the block size or the batch.

use std::ops::Range;

use super::simd::{Float, Kernel, MAX_LANES, Simd, exp};
use super::tiles::{Keys, Strided, accumulate, dots};

/// Most rows of a tile: their scores stay in the second-level cache for a context of some thousand tokens, while keys
/// and values are read once for all.
pub(super) const MAX_TILE_ROWS: usize = 16;

/// Keys and values of one block's tokens, for the KV head in question.
pub(super) struct Block<T> {
    pub(super) keys: Keys<T>,
    pub(super) values: Strided<T>,
}

/// Where a sequence's keys and values lie.
///
/// # Safety
/// A block's pointers must be good for every one of its tokens that a query of the tile sees, and its widths those of the
/// [`Shape`] it is used with.
pub(super) unsafe trait Context {
    /// What the cache holds.
    type Element: Float;
    /// Tokens `index * block_size..(index + 1) * block_size`.
    fn block(&self, index: usize) -> Block<Self::Element>;
}

/// Shape of the work on one sequence, for the query heads that share a KV head. Queries are numbered row by row: number
/// `i` is head `i % group` of row `i / group`.
#[derive(Clone, Copy)]
pub(super) struct Shape<'a> {
    /// Query heads that share the keys.
    pub(super) group: usize,
    /// Rows of the sequence.
    pub(super) rows: usize,
    /// Position of the first row.
    pub(super) position: usize,
    /// Positions a row sees, its own included.
    pub(super) window: usize,
    /// Scores are multiplied by this.
    pub(super) scale: f32,
    /// One more logit for each of the group's heads.
    pub(super) sinks: Option<&'a [f32]>,
    /// Tokens per block.
    pub(super) block_size: usize,
    /// Width of a key: a multiple of the largest register, as all widths here.
    pub(super) key_width: usize,
    /// Width of a value.
    pub(super) value_width: usize,
}

impl Shape<'_> {
    /// Queries in all.
    pub(super) fn queries(&self) -> usize {
        self.rows * self.group
    }

    /// The positions that query `i` sees.
    fn seen(&self, i: usize) -> Range<usize> {
        let end = self.position + i / self.group + 1;
        end.saturating_sub(self.window)..end
    }

    /// The positions that any of some queries sees.
    fn union(&self, queries: &Range<usize>) -> Range<usize> {
        self.seen(queries.start).start..self.seen(queries.end - 1).end
    }

    /// Elements from one query's scores to the next one's: with room for a whole register behind the last.
    fn score_stride(&self, queries: &Range<usize>) -> usize {
        self.union(queries).len() + MAX_LANES
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
    pub(super) fn new(shape: &Shape<'_>, queries: &Range<usize>, scratch: &'a mut [f32]) -> Self {
        let (q, rest) = scratch.split_at_mut(queries.len() * shape.key_width);
        let (out, scores) = rest.split_at_mut(queries.len() * shape.value_width);
        TileScratch { q, out, scores }
    }
}

/// Attention of some consecutive queries: from `scratch.q` to `scratch.out`, which it returns.
pub(super) struct Attend<'a, C> {
    pub(super) shape: Shape<'a>,
    pub(super) queries: Range<usize>,
    pub(super) context: &'a C,
    pub(super) scratch: TileScratch<'a>,
}

impl<'a, C: Context> Kernel for Attend<'a, C> {
    type Output = &'a [f32];
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) -> &'a [f32] {
        self.scores(simd);
        self.scratch.out.fill(0.0);
        let stride = self.shape.score_stride(&self.queries);
        for r in 0..self.queries.len() {
            // The weights end up divided by their sum, so the values' sum is the result.
            let own = self.own(r);
            let row = &mut self.scratch.scores[r * stride..][..stride];
            let sink = self.shape.sinks.map(|s| s[(self.queries.start + r) % self.shape.group]);
            softmax(simd, &mut row[own.start..], own.len(), sink);
        }
        self.values(simd);
        self.scratch.out
    }
}

impl<C: Context> Attend<'_, C> {
    /// First position that the tile sees: column 0 of the scores.
    #[inline(always)]
    fn first(&self) -> usize {
        self.shape.union(&self.queries).start
    }

    /// The columns of the scores that row `r` of the tile sees.
    #[inline(always)]
    fn own(&self, r: usize) -> Range<usize> {
        let (seen, first) = (self.shape.seen(self.queries.start + r), self.first());
        seen.start - first..seen.end - first
    }

    /// The blocks that the tile sees: of each its number, and its tokens as columns of the scores.
    #[inline(always)]
    fn blocks(&self) -> impl Iterator<Item = (usize, Range<usize>)> + use<C> {
        let (seen, size) = (self.shape.union(&self.queries), self.shape.block_size);
        (seen.start / size..seen.end.div_ceil(size)).map(move |b| {
            let tokens = seen.start.max(b * size)..seen.end.min((b + 1) * size);
            (b, tokens.start - seen.start..tokens.end - seen.start)
        })
    }

    /// Rows `r..r + n` of the tile, `n` at most 4.
    #[inline(always)]
    fn quads(&self) -> impl Iterator<Item = (usize, usize)> + use<C> {
        let rows = self.queries.len();
        (0..rows).step_by(4).map(move |r| (r, (rows - r).min(4)))
    }

    /// Scores of all rows. A few of four rows are computed past what a row sees; nobody reads them.
    #[inline(always)]
    fn scores<S: Simd>(&mut self, simd: S) {
        let (first, stride) = (self.first(), self.shape.score_stride(&self.queries));
        let q = Strided { start: self.scratch.q.as_ptr(), stride: self.shape.key_width };
        let out = self.scratch.scores.as_mut_ptr();
        for (b, columns) in self.blocks() {
            let keys = self.context.block(b).keys;
            for (r, n) in self.quads() {
                let seen = intersect(self.own(r).start..self.own(r + n - 1).end, &columns);
                if seen.is_empty() {
                    continue;
                }
                // SAFETY: tokens of this block that a query of the tile sees; the scratch was divided for this shape.
                unsafe {
                    let keys = keys.skip(first + seen.start - b * self.shape.block_size);
                    let out = out.add(r * stride + seen.start);
                    dots(simd, (q.skip(r), n), (keys, seen.len()), self.shape.scale, (out, stride));
                }
            }
        }
    }

    /// Weighted values of all rows, in ascending position. What four rows all see they share; before and after
    /// it each goes alone.
    #[inline(always)]
    fn values<S: Simd>(&mut self, simd: S) {
        for (b, columns) in self.blocks() {
            let values = self.context.block(b).values;
            for (r, n) in self.quads() {
                let start = self.own(r + n - 1).start;
                let shared = start..self.own(r).end.max(start);
                for row in r..r + n {
                    let own = self.own(row);
                    self.add(simd, (row, 1), own.start..shared.start.min(own.end), &columns, (b, values));
                }
                self.add(simd, (r, n), shared.clone(), &columns, (b, values));
                for row in r..r + n {
                    let own = self.own(row);
                    self.add(simd, (row, 1), shared.end.max(own.start)..own.end, &columns, (b, values));
                }
            }
        }
    }

    /// Adds the values of those of `seen` that lie in block `b` (the score columns `columns`) to rows `r..r + n`.
    #[inline(always)]
    fn add<S: Simd>(
        &mut self,
        simd: S,
        (r, n): (usize, usize),
        seen: Range<usize>,
        columns: &Range<usize>,
        (b, values): (usize, Strided<C::Element>),
    ) {
        let seen = intersect(seen, columns);
        if seen.is_empty() {
            return;
        }
        let (stride, width) = (self.shape.score_stride(&self.queries), self.shape.value_width);
        // SAFETY: tokens of this block that a query of the tile sees; the scratch was divided for this shape.
        unsafe {
            let values = values.skip(self.first() + seen.start - b * self.shape.block_size);
            let p = Strided { start: self.scratch.scores.as_ptr().add(r * stride + seen.start), stride };
            let out = self.scratch.out.as_mut_ptr().add(r * width);
            accumulate(simd, (p, n), (values, seen.len()), (out, width));
        }
    }
}

/// What two ranges share; empty where they share nothing.
#[inline(always)]
fn intersect(a: Range<usize>, b: &Range<usize>) -> Range<usize> {
    a.start.max(b.start)..a.end.min(b.end)
}

/// The softmax of the first `len` elements of `x` (and a logit without a place) in place. `x` has room for a whole
/// register behind them.
#[inline(always)]
fn softmax<S: Simd>(simd: S, x: &mut [f32], len: usize, sink: Option<f32>) {
    let end = len.next_multiple_of(S::LANES);
    x[len..end].fill(f32::NEG_INFINITY);
    let x = &mut x[..end];
    let start = x.as_mut_ptr();
    let mut max = simd.splat(sink.unwrap_or(f32::NEG_INFINITY));
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
        let sink = sink.map_or(0.0, |sink| simd.to_array(exp(simd, simd.sub(simd.splat(sink), max)))[0]);
        let factor = simd.splat(1.0 / (simd.sum(sum) + sink));
        for i in (0..end).step_by(S::LANES) {
            simd.store(start.add(i), simd.mul(simd.load(start.add(i)), factor));
        }
    }
}

#[cfg(test)]
mod tests;
