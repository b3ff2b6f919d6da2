//! Softmax attention of a tile of queries over blocks of keys and values: the core of GQA and of expanded MLA.
//!
//! A block's keys are a panel `[key width][tokens]` and its values one of `[tokens][value width]`, as [`super::product`] wants
//! them, so scores and weighted values are products like any other. Three passes: all scores of a row; their maximum, weights
//! (in the type of the cache, not yet divided by their sum) and sum; the weighted values in ascending position. Tokens that a row
//! does not see weigh exactly nothing. So a row's bits do not depend on the tile, the chunk, the block size or the batch.

use std::ops::Range;

use super::product::{Ahead, Operand, Panel, Product, Strided, Sums, strip, tallest};
use super::simd::{Float, Kernel, MAX_LANES, Simd, exp};

/// Most queries of a tile: each block of keys and values is read once for all.
const MAX_TILE_ROWS: usize = 64;
/// Fewest where there is enough work for all threads.
const MIN_TILE_ROWS: usize = 16;
/// Scores of a tile that stay in the second-level cache.
const TILE_SCORES: usize = 1 << 17;
/// How far ahead of its use a panel is fetched, in elements: one that comes from memory is too short for the hardware to notice.
const AHEAD: usize = 512;

/// Keys and values of one block's tokens, for the KV head in question.
pub(super) struct Block<T> {
    /// The two parts of the keys, each `[its width][tokens]`; the second may have no width.
    pub(super) keys: [*const T; 2],
    /// `[tokens][value width]`
    pub(super) values: *const T,
}

/// Where a sequence's keys and values lie.
///
/// # Safety
/// A block's pointers must be good for all of its tokens, finite as far as a query of the tile sees them (rounded up to a
/// whole step of the product), in panels of the widths of the [`Shape`] it is used with.
pub(super) unsafe trait Context {
    /// What the cache holds.
    type Element: Operand<Self::Element>;
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
    /// Tokens per block: a multiple of the largest register, as all widths here.
    pub(super) block_size: usize,
    /// Widths of the two parts of a key.
    pub(super) key_widths: [usize; 2],
    /// Width of a value.
    pub(super) value_width: usize,
}

impl Shape<'_> {
    /// Queries in all.
    pub(super) fn queries(&self) -> usize {
        self.rows * self.group
    }

    /// Elements of a query.
    pub(super) fn key_width(&self) -> usize {
        self.key_widths[0] + self.key_widths[1]
    }

    /// The positions that query `i` sees.
    fn seen(&self, i: usize) -> Range<usize> {
        let end = self.position + i / self.group + 1;
        end.saturating_sub(self.window)..end
    }

    /// The positions that any of some queries sees, in whole registers.
    fn union(&self, queries: &Range<usize>) -> Range<usize> {
        whole(self.seen(queries.start).start..self.seen(queries.end - 1).end, MAX_LANES)
    }

    /// Elements from one query's scores to the next one's: not a power of two, whose rows would compete for places in the cache.
    fn score_stride(&self, queries: &Range<usize>) -> usize {
        self.union(queries).len() + MAX_LANES
    }

    /// f32 of scratch of one tile.
    pub(super) fn scratch(&self, queries: &Range<usize>) -> usize {
        queries.len() * (self.key_width() + self.value_width + self.score_stride(queries))
    }
}

/// Queries per tile, of a sequence whose last row sees `context` positions: fewer than the most for a long context, or where
/// there would be too few tiles for the threads.
pub(super) fn tile_rows(threads: usize, queries: usize, context: usize) -> usize {
    let mut rows = MAX_TILE_ROWS;
    while rows > MIN_TILE_ROWS && (rows * context > TILE_SCORES || queries.div_ceil(rows) < 4 * threads) {
        rows /= 2;
    }
    rows
}

/// A tile's queries and outputs: the scratch of [`Shape::scratch`], divided.
pub(super) struct TileScratch<'a, T> {
    /// `[queries, key width]`, padded with zeros.
    pub(super) q: &'a mut [T],
    /// `[queries, value width]`
    out: &'a mut [f32],
    /// `[queries, score stride]`; a row's weights take the place of its scores, from the front.
    scores: &'a mut [f32],
}

impl<'a, T: Operand<T>> TileScratch<'a, T> {
    /// Divides a scratch, whose contents are left over from other uses.
    pub(super) fn new(shape: &Shape<'_>, queries: &Range<usize>, scratch: &'a mut [f32]) -> Self {
        const { assert!(size_of::<T>() <= size_of::<f32>() && align_of::<T>() <= align_of::<f32>()) };
        let len = queries.len() * shape.key_width();
        let (q, rest) = scratch.split_at_mut(len);
        let (out, scores) = rest.split_at_mut(queries.len() * shape.value_width);
        // SAFETY: as many elements of a type that is no larger, of which any bits are a value.
        let q = unsafe { std::slice::from_raw_parts_mut(q.as_mut_ptr().cast(), len) };
        TileScratch { q, out, scores }
    }
}

/// Attention of some consecutive queries: from `scratch.q` to the outputs `[queries, value width]`.
pub(super) struct Attend<'a, C: Context> {
    pub(super) shape: Shape<'a>,
    pub(super) queries: Range<usize>,
    pub(super) context: &'a C,
    pub(super) scratch: TileScratch<'a, C::Element>,
}

/// How scores and weighted values are computed.
type By<S, C> = <<C as Context>::Element as Operand<<C as Context>::Element>>::Product<S>;

impl<'a, C: Context> Kernel for Attend<'a, C> {
    type Output = &'a [f32];
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) -> &'a [f32] {
        let (rows, width) = (self.queries.len(), self.shape.value_width);
        self.scores(simd);
        let mut factors = [0.0; MAX_TILE_ROWS];
        for (r, factor) in factors.iter_mut().enumerate().take(rows) {
            *factor = self.weights(simd, r);
        }
        self.scratch.out.fill(0.0);
        self.values(simd);
        for (out, &factor) in self.scratch.out.chunks_exact_mut(width).zip(&factors) {
            let factor = simd.splat(factor);
            for d in (0..width).step_by(S::LANES) {
                // SAFETY: widths are whole registers.
                unsafe {
                    let to = out.as_mut_ptr().add(d);
                    simd.store(to, simd.mul(simd.load(to), factor));
                }
            }
        }
        self.scratch.out
    }
}

impl<C: Context> Attend<'_, C> {
    /// Position of column 0 of the scores: that of a whole register.
    #[inline(always)]
    fn first(&self) -> usize {
        self.shape.union(&self.queries).start
    }

    /// The columns of the scores that some rows of the tile see, together.
    #[inline(always)]
    fn own(&self, rows: Range<usize>) -> Range<usize> {
        let first = self.first();
        let seen = |r| self.shape.seen(self.queries.start + r);
        seen(rows.start).start - first..seen(rows.end - 1).end - first
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

    /// Rows of the tile, strip by strip.
    #[inline(always)]
    fn strips<S: Simd>(&self) -> impl Iterator<Item = Range<usize>> + use<S, C> {
        let (rows, height) = (self.queries.len(), const { tallest::<S>() });
        (0..rows).step_by(height).map(move |r| r..rows.min(r + height))
    }

    /// Elements from one row's scores to the next one's.
    #[inline(always)]
    fn stride(&self) -> usize {
        self.shape.score_stride(&self.queries)
    }

    /// Scores of all rows, unscaled. Some are computed past what a row sees; nobody reads them.
    #[inline(always)]
    fn scores<S: Simd>(&mut self, simd: S) {
        let (first, stride) = (self.first(), self.stride());
        let (width, block_size) = (self.shape.key_width(), self.shape.block_size);
        let group = const { <By<S, C> as Product<S>>::STEP };
        let out = self.scratch.scores.as_mut_ptr();
        for (b, columns) in self.blocks() {
            let keys = self.context.block(b).keys;
            for rows in self.strips::<S>() {
                let seen = intersect(whole(self.own(rows.clone()), MAX_LANES), &columns);
                if seen.is_empty() {
                    continue;
                }
                let token = first + seen.start - b * block_size;
                let mut before = 0;
                for (keys, k) in keys.into_iter().zip(self.shape.key_widths).filter(|&(_, k)| k > 0) {
                    let start = keys.wrapping_add(token * group);
                    let panel = Panel { start, k, pitch: block_size, ahead: Ahead::by(AHEAD) };
                    // SAFETY: tokens of this block; the scratch was divided for this shape, whose parts a query has one after another.
                    unsafe {
                        let q = self.scratch.q.as_ptr().add(rows.start * width + before);
                        let start = out.add(rows.start * stride + seen.start);
                        let sums = Sums { start, stride, add: before > 0 };
                        let q = (Strided { start: q, stride: width }, rows.len());
                        strip::<S, By<S, C>, false>(simd, q, (panel, seen.len()), sums);
                    }
                    before += k;
                }
            }
        }
    }

    /// Turns the scores of row `r` into weights, zero where the row does not see; returns what they have to be multiplied by for their
    /// sum to be 1.
    #[inline(always)]
    fn weights<S: Simd>(&mut self, simd: S, r: usize) -> f32 {
        let (stride, own, scale) = (self.stride(), self.own(r..r + 1), self.shape.scale);
        let sink = self.shape.sinks.map(|sinks| sinks[(self.queries.start + r) % self.shape.group]);
        let row = &mut self.scratch.scores[r * stride..][..stride - MAX_LANES];
        let least = sink.unwrap_or(f32::NEG_INFINITY);
        let (max, sum) = weigh::<S, C::Element>(simd, row, own, scale, least);
        let sink = match sink {
            Some(sink) => simd.to_array(exp(simd, simd.splat(sink - max)))[0],
            None => 0.0,
        };
        1.0 / (sum + sink)
    }

    /// Weighted values of all rows, in ascending position.
    #[inline(always)]
    fn values<S: Simd>(&mut self, simd: S) {
        let (first, width) = (self.first(), self.shape.value_width);
        let group = const { <By<S, C> as Product<S>>::STEP };
        let stride = self.stride() * size_of::<f32>() / size_of::<C::Element>();
        let weights = self.scratch.scores.as_ptr().cast::<C::Element>();
        let out = self.scratch.out.as_mut_ptr();
        for (b, columns) in self.blocks() {
            let values = self.context.block(b).values;
            for rows in self.strips::<S>() {
                let seen = intersect(whole(self.own(rows.clone()), group), &columns);
                if seen.is_empty() {
                    continue;
                }
                let token = first + seen.start - b * self.shape.block_size;
                let start = values.wrapping_add(token * width);
                let panel = Panel { start, k: seen.len(), pitch: width, ahead: Ahead::by(AHEAD) };
                // SAFETY: tokens of this block; the scratch was divided for this shape.
                unsafe {
                    let start = weights.add(rows.start * stride + seen.start);
                    let sums = Sums { start: out.add(rows.start * width), stride: width, add: true };
                    strip::<S, By<S, C>, false>(
                        simd,
                        (Strided { start, stride }, rows.len()),
                        (panel, width),
                        sums,
                    );
                }
            }
        }
    }
}

/// Turns a row of scores, whole registers, into weights `e^(score * scale - maximum)`, from the front; they are zero outside `own`, the
/// columns that the row sees. Returns the maximum, `least` or more, and the sum of the weights as they were rounded.
#[inline(always)]
pub(super) fn weigh<S: Simd, T: Operand<T>>(
    simd: S,
    row: &mut [f32],
    own: Range<usize>,
    scale: f32,
    least: f32,
) -> (f32, f32) {
    let (registers, end, scale) = (whole(own.clone(), MAX_LANES), row.len(), simd.splat(scale));
    assert!(registers.end <= end, "scores of {own:?} in {end}");
    row[registers.start..own.start].fill(f32::NEG_INFINITY);
    row[own.end..registers.end].fill(f32::NEG_INFINITY);
    let (from, to) = (row.as_mut_ptr(), row.as_mut_ptr().cast::<T>());
    let mut max = simd.splat(least);
    let mut sum = simd.zero();
    // SAFETY: whole registers inside the row. A weight is no larger than a score, so it is stored over scores that were read.
    unsafe {
        for i in registers.clone().step_by(S::LANES) {
            max = simd.max(simd.mul(simd.load(from.add(i)), scale), max);
        }
        let most = simd.max_lane(max);
        let max = simd.splat(most);
        for i in registers.clone().step_by(S::LANES) {
            let weight = exp(simd, simd.sub(simd.mul(simd.load(from.add(i)), scale), max));
            T::store_weights(simd, to.add(i), weight);
            sum = simd.add(sum, <T as Float>::load(simd, to.add(i)));
        }
        std::slice::from_raw_parts_mut(to, registers.start).fill(T::default());
        std::slice::from_raw_parts_mut(to.add(registers.end), end - registers.end).fill(T::default());
        (most, simd.sum(sum))
    }
}

/// What two ranges share; empty where they share nothing.
#[inline(always)]
fn intersect(a: Range<usize>, b: &Range<usize>) -> Range<usize> {
    a.start.max(b.start)..a.end.min(b.end)
}

/// A range widened to multiples of a number.
#[inline(always)]
fn whole(range: Range<usize>, of: usize) -> Range<usize> {
    range.start / of * of..range.end.next_multiple_of(of)
}

#[cfg(test)]
mod tests;
