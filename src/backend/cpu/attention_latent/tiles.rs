//! The two register tiles of attention over latents, which lie in rows and are keys and values at once: [`scores`] multiplies rows
//! by rows, [`values`] weights by rows. bf16 go into either as pairs, as they are: neighbours of a row in the one, neighbours of a
//! column, brought together in registers, in the other.
//!
//! Every output element is computed in an order of its own, whatever tile it falls into: a score runs over the vector, lane by
//! lane, then over the lanes; a value takes one token (bf16: two tokens) after the other.

use half::bf16;

use super::super::product::{Operand, Strided};
use super::super::simd::{LINE, Simd};

/// Rows of the tallest tile: queries lie in buffers of a multiple of [`MIN_ROWS`] rows.
const MAX_ROWS: usize = 8;
/// Rows of the lowest tile. Rows past the last query are computed too, and dropped.
pub(in super::super) const MIN_ROWS: usize = 4;

/// Elements of a cache of latents, as registers hold them.
pub(in super::super) trait Latent: Operand<Self> {
    /// Elements that lie side by side in 32 bits.
    const GROUP: usize;
    /// `GROUP * LANES` elements.
    type Register<S: Simd>: Copy;

    /// A register of consecutive elements.
    ///
    /// # Safety
    /// `from` has that many.
    unsafe fn register<S: Simd>(simd: S, from: *const Self) -> Self::Register<S>;
    /// `GROUP` elements, again and again.
    ///
    /// # Safety
    /// `from` has that many.
    unsafe fn repeat<S: Simd>(simd: S, from: *const Self) -> Self::Register<S>;
    /// In each lane `acc` plus the products of its elements.
    fn dot<S: Simd>(simd: S, acc: S::V, a: Self::Register<S>, b: Self::Register<S>) -> S::V;
    /// `2 * LANES` columns of `GROUP` rows: a lane has the elements of one column. Without a second row, its elements are 0.
    ///
    /// # Safety
    /// Rows have that many elements.
    unsafe fn columns<S: Simd>(
        simd: S,
        row: *const Self,
        second: Option<*const Self>,
    ) -> [Self::Register<S>; 2];
}

impl Latent for f32 {
    const GROUP: usize = 1;
    type Register<S: Simd> = S::V;

    #[inline(always)]
    unsafe fn register<S: Simd>(simd: S, from: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load(from) }
    }
    #[inline(always)]
    unsafe fn repeat<S: Simd>(simd: S, from: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        simd.splat(unsafe { *from })
    }
    #[inline(always)]
    fn dot<S: Simd>(simd: S, acc: S::V, a: S::V, b: S::V) -> S::V {
        simd.fma(a, b, acc)
    }
    #[inline(always)]
    unsafe fn columns<S: Simd>(simd: S, row: *const f32, _: Option<*const f32>) -> [S::V; 2] {
        // SAFETY: the caller's promise.
        unsafe { [simd.load(row), simd.load(row.add(S::LANES))] }
    }
}

impl Latent for bf16 {
    const GROUP: usize = 2;
    type Register<S: Simd> = S::Pairs;

    #[inline(always)]
    unsafe fn register<S: Simd>(simd: S, from: *const bf16) -> S::Pairs {
        // SAFETY: the caller's promise.
        unsafe { simd.load_pairs(from) }
    }
    #[inline(always)]
    unsafe fn repeat<S: Simd>(simd: S, from: *const bf16) -> S::Pairs {
        // SAFETY: the caller's promise; a pair is 32 bits, little endian as the lanes are.
        simd.splat_pair(unsafe { from.cast::<u32>().read_unaligned() })
    }
    #[inline(always)]
    fn dot<S: Simd>(simd: S, acc: S::V, a: S::Pairs, b: S::Pairs) -> S::V {
        simd.dot(acc, a, b)
    }
    #[inline(always)]
    unsafe fn columns<S: Simd>(simd: S, row: *const bf16, second: Option<*const bf16>) -> [S::Pairs; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let second = match second {
                Some(row) => simd.load_pairs(row),
                None => simd.splat_pair(0),
            };
            simd.interleave(simd.load_pairs(row), second)
        }
    }
}

/// Whether a tile of [`MAX_ROWS`] has its registers.
const fn tall<S: Simd>() -> bool {
    S::REGISTERS >= 32
}

/// Rows of the tile that begins where so many are left.
#[inline(always)]
pub(super) fn height<S: Simd>(left: usize) -> usize {
    if const { tall::<S>() } && left > MIN_ROWS { MAX_ROWS } else { MIN_ROWS }
}

/// `out[r][t] = q[r] . tokens[t]` for the rows of a tile of [`height`]. While a token is at work, the one `ahead` of it is fetched.
///
/// # Safety
/// `q` has rows of `width`, tokens likewise: whole registers; a row of `out` has room for the tokens and [`MIN_ROWS`] more.
#[inline(always)]
pub(super) unsafe fn scores<S: Simd, T: Latent>(
    simd: S,
    (q, rows): (Strided<T>, usize),
    (tokens, width): (&[*const T], usize),
    ahead: usize,
    out: (*mut f32, usize),
) {
    // SAFETY: the caller's promise.
    unsafe {
        if rows == MAX_ROWS {
            score_tiles::<S, T, MAX_ROWS, 2>(simd, q, (tokens, width), ahead, out);
        } else if const { tall::<S>() } {
            score_tiles::<S, T, MIN_ROWS, 4>(simd, q, (tokens, width), ahead, out);
        } else {
            score_tiles::<S, T, MIN_ROWS, 2>(simd, q, (tokens, width), ahead, out);
        }
    }
}

/// [`scores`] of `R` rows, `C` tokens at a time.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
unsafe fn score_tiles<S: Simd, T: Latent, const R: usize, const C: usize>(
    simd: S,
    q: Strided<T>,
    (tokens, width): (&[*const T], usize),
    ahead: usize,
    (out, stride): (*mut f32, usize),
) {
    let last = tokens.len() - 1;
    for first in (0..tokens.len()).step_by(C) {
        let mut keys = [tokens[last]; C];
        let mut next = [tokens[last]; C];
        for c in 0..C {
            keys[c] = tokens[last.min(first + c)];
            next[c] = tokens[last.min(first + c + ahead)];
        }
        let mut sums = [[simd.zero(); C]; R];
        for d in (0..width).step_by(T::GROUP * S::LANES) {
            // SAFETY: `d` is a whole register before the end of a row.
            unsafe {
                let mut k = [T::register(simd, keys[0].add(d)); C];
                for c in 0..C {
                    k[c] = T::register(simd, keys[c].add(d));
                    simd.prefetch(next[c].wrapping_add(d).cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let q = T::register(simd, q.at(r, d));
                    for (sum, &k) in sums.iter_mut().zip(&k) {
                        *sum = T::dot(simd, *sum, q, k);
                    }
                }
            }
        }
        // Eight sums at a time: of 8 / R tokens.
        for c in (0..C).step_by(8 / R) {
            let mut eight = [simd.zero(); 8];
            for (i, sum) in eight.iter_mut().enumerate() {
                *sum = sums[i % R][c + i / R];
            }
            for (i, sum) in simd.sums(eight).into_iter().enumerate() {
                // SAFETY: row `i % R`; up to `C - 1` tokens past the last.
                unsafe { *out.add(i % R * stride + first + c + i / R) = sum };
            }
        }
    }
}

/// Where [`values`] leaves what it computes.
pub(super) struct Means {
    /// Rows of values.
    pub(super) start: *mut f32,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// Of each row: what is there is multiplied by the first, what comes by the second. Without any, what comes takes the place.
    pub(super) join: Option<[[f32; 2]; MAX_ROWS]>,
    /// Which rows are wanted.
    pub(super) wanted: [bool; MAX_ROWS],
}

/// `means[r] = sum_t weights[r][t] * tokens[t]`, t ascending, for the rows of a tile of [`height`]. While a token is at work, the one in
/// its place in `next`, as many, is fetched.
///
/// # Safety
/// Weights have those rows, with whole groups of tokens; tokens have `width` elements, a multiple of two registers of f32, and so
/// have the wanted rows of `means`.
#[inline(always)]
pub(super) unsafe fn values<S: Simd, T: Latent>(
    simd: S,
    (weights, rows): (Strided<T>, usize),
    (tokens, next, width): (&[*const T], &[*const T], usize),
    means: &Means,
) {
    // SAFETY: the caller's promise; each step is within the width.
    unsafe {
        if rows == MAX_ROWS {
            for d in (0..width).step_by(2 * S::LANES) {
                value_tile::<S, T, MAX_ROWS, 1>(simd, weights, (tokens, next, d), means);
            }
        } else {
            let mut d = 0;
            while const { tall::<S>() } && d + 4 * S::LANES <= width {
                value_tile::<S, T, MIN_ROWS, 2>(simd, weights, (tokens, next, d), means);
                d += 4 * S::LANES;
            }
            while d < width {
                value_tile::<S, T, MIN_ROWS, 1>(simd, weights, (tokens, next, d), means);
                d += 2 * S::LANES;
            }
        }
    }
}

/// `R` rows of weights times `2 * N * LANES` columns of the tokens from `d` on.
///
/// # Safety
/// As [`values`].
#[inline(always)]
unsafe fn value_tile<S: Simd, T: Latent, const R: usize, const N: usize>(
    simd: S,
    weights: Strided<T>,
    (tokens, next, d): (&[*const T], &[*const T], usize),
    means: &Means,
) {
    assert!(next.len() == tokens.len(), "{} tokens, then {}", tokens.len(), next.len());
    let mut sums = [[[simd.zero(); 2]; N]; R];
    let whole = tokens.len() / T::GROUP * T::GROUP;
    // SAFETY: the caller's promise; weights are there for whole groups. A check of an index in the loop would keep the sums in memory.
    unsafe {
        for t in (0..whole).step_by(T::GROUP) {
            for t in t..t + T::GROUP {
                let next = next.get_unchecked(t).wrapping_add(d);
                for byte in (0..2 * N * S::LANES * size_of::<T>()).step_by(LINE) {
                    simd.prefetch(next.wrapping_byte_add(byte).cast());
                }
            }
            let second = Some(tokens.get_unchecked(t + T::GROUP - 1).add(d));
            add_tokens::<S, T, R, N>(simd, (weights, t), (tokens.get_unchecked(t).add(d), second), &mut sums);
        }
        if whole < tokens.len() {
            let row = tokens[whole].add(d);
            add_tokens::<S, T, R, N>(simd, (weights, whole), (row, None), &mut sums);
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        if !means.wanted[r] {
            continue;
        }
        for (n, sums) in sums.iter().enumerate() {
            for (half, &sum) in sums.iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe {
                    let to = means.start.add(r * means.stride + d + (2 * n + half) * S::LANES);
                    let sum = match &means.join {
                        None => sum,
                        Some(join) => joined(simd, simd.load(to), sum, join[r]),
                    };
                    simd.store(to, sum);
                }
            }
        }
    }
}

/// One group of tokens, whose first has number `t`, joins the sums.
///
/// # Safety
/// There are R rows of weights, and `2 * N * LANES` elements of each token.
#[inline(always)]
unsafe fn add_tokens<S: Simd, T: Latent, const R: usize, const N: usize>(
    simd: S,
    (weights, t): (Strided<T>, usize),
    (row, second): (*const T, Option<*const T>),
    sums: &mut [[[S::V; 2]; N]; R],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut v = [T::columns(simd, row, second); N];
        for (n, v) in v.iter_mut().enumerate().skip(1) {
            let column = 2 * n * S::LANES;
            *v = T::columns(simd, row.add(column), second.map(|row| row.add(column)));
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            let weight = T::repeat(simd, weights.at(r, t));
            for (sums, v) in sums.iter_mut().zip(&v) {
                for (sum, &v) in sums.iter_mut().zip(v) {
                    *sum = T::dot(simd, *sum, weight, v);
                }
            }
        }
    }
}

/// What two parts make together, each multiplied by its factor.
#[inline(always)]
pub(super) fn joined<S: Simd>(simd: S, early: S::V, late: S::V, [e, l]: [f32; 2]) -> S::V {
    simd.fma(early, simd.splat(e), simd.mul(late, simd.splat(l)))
}
