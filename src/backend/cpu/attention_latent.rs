//! Softmax attention of some query heads over cached latents in place, which are keys (rotary part included) and values
//! of all heads at once: the core of the absorbed form of MLA.
//!
//! Positions go in groups of [`GROUP`], so that a group's latents come from memory once and stay in the second-level cache
//! while all queries of a tile score them, weigh them (relative to the group's own maximum) and add them up; groups join in
//! ascending order. Borders are absolute positions and each row takes exactly the groups it sees. So a row's bits depend neither on
//! the tile, the chunk, the block size or the batch, nor on whether one task took all groups or each had a task of its own (flash
//! decoding, Dao et al. 2023).

mod tiles;

use std::ops::Range;

use super::attention::weigh;
use super::memory::Rows;
use super::product::Strided;
use super::simd::{Kernel, MAX_LANES, Simd, exp};
pub(super) use tiles::Latent;
use tiles::{Means, height, joined, scores, values};

/// Positions whose latents are read together.
pub(super) const GROUP: usize = 256;
/// Most queries of a tile.
pub(super) const MAX_TILE: usize = 32;
/// Elements from one query's scores in a group to the next one's: not a power of two, whose rows would compete for places in the cache.
const SCORE_STRIDE: usize = GROUP + MAX_LANES;
/// How many tokens ahead of its use a latent is fetched.
const AHEAD: usize = 8;
/// Rows that exist in a buffer of queries behind the last one: a tile may compute them.
pub(super) const SPARE_ROWS: usize = tiles::MIN_ROWS - 1;
/// f32 of scratch of one tile.
pub(super) const SCRATCH: usize = (MAX_TILE + SPARE_ROWS) * SCORE_STRIDE;

/// The cached latents of one sequence: rows of a latent and, behind it, a rotary key.
pub(super) struct LatentContext<'a, T> {
    pub(super) cache: Rows<'a, T>,
    /// The sequence's blocks.
    pub(super) table: &'a [u32],
    pub(super) block_size: usize,
}

impl<T: Latent> LatentContext<'_, T> {
    /// Where the rows of some positions, [`GROUP`] at most, lie.
    #[inline(always)]
    fn rows(&self, positions: Range<usize>) -> [*const T; GROUP] {
        let mut rows = [std::ptr::null(); GROUP];
        let (mut block, mut token) = (positions.start / self.block_size, positions.start % self.block_size);
        for row in &mut rows[..positions.len()] {
            *row = self.cache.row(self.table[block] as usize * self.block_size + token).as_ptr();
            token += 1;
            if token == self.block_size {
                (block, token) = (block + 1, 0);
            }
        }
        rows
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
    /// Width of a key: a multiple of two of the largest registers, as all widths here.
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

    /// How many groups query `i` sees.
    pub(super) fn groups(&self, i: usize) -> usize {
        self.seen(i).div_ceil(GROUP)
    }
}

/// f32 of a part: the weighted latents of some groups, then their maximum and their sum of weights.
pub(super) fn part_width(value_width: usize) -> usize {
    value_width + MAX_LANES
}

/// Attention of some consecutive queries, [`MAX_TILE`] at most, over the groups of the range that each sees.
pub(super) struct Attend<'a, T> {
    pub(super) shape: Shape,
    pub(super) queries: Range<usize>,
    pub(super) groups: Range<usize>,
    pub(super) context: &'a LatentContext<'a, T>,
    /// Their `[queries + SPARE_ROWS, key_width]`.
    pub(super) q: &'a [T],
    /// [`SCRATCH`] elements.
    pub(super) scratch: &'a mut [f32],
    pub(super) parts: Parts,
}

/// Where the results of queries go, those that see any of the groups: rows of [`part_width`].
pub(super) struct Parts {
    start: *mut f32,
    stride: usize,
    apart: bool,
}

impl Parts {
    /// Rows `stride` elements apart. The groups of a row join in one part, or lie `apart`, one after another.
    ///
    /// # Safety
    /// There are such parts for the tile's queries, good for whoever attends, and nobody else uses them meanwhile.
    pub(super) unsafe fn new(start: *mut f32, stride: usize, apart: bool) -> Self {
        Parts { start, stride, apart }
    }

    /// Elements before row `r` of group `i` of those attended to.
    #[inline(always)]
    fn place(&self, r: usize, i: usize, value_width: usize) -> usize {
        r * self.stride + if self.apart { i * part_width(value_width) } else { 0 }
    }
}

impl<T: Latent> Kernel for Attend<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let (rows, shape) = (self.queries.len(), self.shape);
        assert!(rows <= MAX_TILE, "{rows} queries");
        assert!(self.q.len() >= (rows + SPARE_ROWS) * shape.key_width, "{} for {rows} queries", self.q.len());
        assert!(self.scratch.len() >= SCRATCH, "scratch of {}", self.scratch.len());
        for group in self.groups.clone() {
            self.group(simd, group);
        }
    }
}

impl<T: Latent> Attend<'_, T> {
    /// How many positions of a group row `r` of the tile sees.
    #[inline(always)]
    fn seen(&self, group: usize, r: usize) -> usize {
        self.shape.seen(self.queries.start + r).saturating_sub(group * GROUP).min(GROUP)
    }

    /// One group: its part of each row takes the place of what was there, or joins it.
    #[inline(always)]
    fn group<S: Simd>(&mut self, simd: S, group: usize) {
        let (count, width) = (self.queries.len(), self.shape.key_width);
        let most = self.seen(group, count - 1);
        let first = group * GROUP;
        let tokens = self.context.rows(first..first + most);
        // The next group comes from memory while values of this one are computed.
        let mut next = tokens;
        if group + 1 < self.groups.end {
            let most = self.seen(group + 1, count - 1);
            next[..most].copy_from_slice(&self.context.rows(first + GROUP..first + GROUP + most)[..most]);
        }
        let mut r = 0;
        while r < count {
            let rows = height::<S>(count - r);
            let own = count.min(r + rows);
            let tokens = &tokens[..self.seen(group, own - 1)];
            if !tokens.is_empty() {
                let out = (self.scratch[r * SCORE_STRIDE..].as_mut_ptr(), SCORE_STRIDE);
                let q = Strided { start: self.q[r * width..].as_ptr(), stride: width };
                // SAFETY: `run` has compared the sizes; tokens are rows of the cache.
                unsafe { scores(simd, (q, rows), (tokens, width), AHEAD, out) };
                let next = if r == 0 { &next[..tokens.len()] } else { tokens };
                self.strip(simd, group, (r..own, rows), (tokens, next));
            }
            r += rows;
        }
    }

    /// Weights and weighted latents of the rows of one tile of registers, of which so many are computed.
    #[inline(always)]
    fn strip<S: Simd>(
        &mut self,
        simd: S,
        group: usize,
        (own, rows): (Range<usize>, usize),
        (tokens, next): (&[*const T], &[*const T]),
    ) {
        let (width, i) = (self.shape.value_width, group - self.groups.start);
        let joins = i > 0 && !self.parts.apart;
        // SAFETY: a row of the tile.
        let start = unsafe { self.parts.start.add(self.parts.place(own.start, i, width)) };
        let mut means = Means { start, stride: self.parts.stride, join: None, wanted: [false; _] };
        let mut join = [[0.0; 2]; _];
        for (of_strip, r) in own.clone().enumerate() {
            let seen = self.seen(group, r);
            if seen == 0 {
                continue;
            }
            let row = &mut self.scratch[r * SCORE_STRIDE..][..GROUP];
            let late = weigh::<S, T>(simd, row, 0..seen, self.shape.scale, f32::NEG_INFINITY);
            let late = State { max: late.0, sum: late.1 };
            // SAFETY: a row of the tile; a state fits behind its values.
            unsafe {
                let to = self.parts.start.add(self.parts.place(r, i, width) + width).cast::<State>();
                if joins {
                    let (state, factors) = to.read().join(simd, late);
                    to.write(state);
                    join[of_strip] = factors;
                } else {
                    to.write(late);
                }
            }
            means.wanted[of_strip] = true;
        }
        if joins {
            means.join = Some(join);
        }
        let stride = SCORE_STRIDE * size_of::<f32>() / size_of::<T>();
        let weights =
            Strided { start: self.scratch[own.start * SCORE_STRIDE..].as_ptr().cast::<T>(), stride };
        // SAFETY: `run` has compared the sizes; weights of a row fill the front of the place of its scores.
        unsafe { values(simd, (weights, rows), (tokens, next, width), &means) };
    }
}

/// A softmax in the making: the maximum of the scores, and the sum of the weights relative to it.
#[derive(Clone, Copy)]
#[repr(C)]
struct State {
    max: f32,
    sum: f32,
}

impl State {
    /// Both together, and by what the values of `self` and `late` are multiplied.
    #[inline(always)]
    fn join<S: Simd>(self, simd: S, late: State) -> (State, [f32; 2]) {
        let max = if late.max > self.max { late.max } else { self.max };
        let early = simd.to_array(exp(simd, simd.splat(self.max - max)))[0];
        let factors = [early, simd.to_array(exp(simd, simd.splat(late.max - max)))[0]];
        let sum = simd.to_array(joined(simd, simd.splat(self.sum), simd.splat(late.sum), factors))[0];
        (State { max, sum }, factors)
    }
}

/// The mean latent of a query from the parts that make it up, in ascending order.
pub(super) struct Mean<'a, T> {
    /// `[parts, part_width]`; the first takes in the others.
    pub(super) parts: &'a mut [f32],
    pub(super) out: &'a mut [T],
}

impl<T: Latent> Kernel for Mean<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.out.len();
        let state = |part: &[f32]| State { max: part[width], sum: part[width + 1] };
        let (first, rest) = self.parts.split_at_mut(part_width(width));
        let mut all = state(first);
        for late in rest.chunks_exact(part_width(width)) {
            let factors;
            (all, factors) = all.join(simd, state(late));
            for d in (0..width).step_by(S::LANES) {
                // SAFETY: widths are whole registers.
                unsafe {
                    let to = first.as_mut_ptr().add(d);
                    simd.store(to, joined(simd, simd.load(to), simd.load(late.as_ptr().add(d)), factors));
                }
            }
        }
        let factor = simd.splat(1.0 / all.sum);
        for d in (0..width).step_by(S::LANES) {
            // SAFETY: as above.
            unsafe {
                let mean = simd.mul(simd.load(first.as_ptr().add(d)), factor);
                T::store(simd, self.out.as_mut_ptr().add(d), mean);
            }
        }
    }
}
