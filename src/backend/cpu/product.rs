//! The register tile of every matrix product: some rows of activations times some columns of weights.
//!
//! Weights lie in panels: k-major, with as many consecutive k side by side as a step of the product takes. A panel may hold columns
//! of a matrix, tokens of a block of keys, or dimensions of a block of values.
//!
//! An output element is one chain of additions over k, ascending, in its own accumulator; it can pause in memory, which
//! loses nothing. Tiles of other shapes only choose which chains run side by side, so they all give the same bits.

use half::bf16;

use super::simd::{Float, LINE, Simd};

/// Bytes of one block of a panel at most: it, the next one and the rows fit into a first-level cache of 48 KiB, and sums seldom leave the
/// registers.
pub const BLOCK_BYTES: usize = 18 << 10;
/// How far ahead a single strip of rows fetches weights: somewhat more than what arrives from memory in the time of one access.
const AHEAD_BYTES: usize = 8 << 10;

/// Where rows of activations start and how far apart they are.
pub struct Strided<T> {
    /// Element (0, 0).
    pub start: *const T,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<T> Clone for Strided<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Strided<T> {}

impl<T> Strided<T> {
    /// Address of an element.
    #[inline(always)]
    pub unsafe fn at(self, row: usize, k: usize) -> *const T {
        // SAFETY: the caller names an element that exists.
        unsafe { self.start.add(row * self.stride + k) }
    }
}

/// How one step along k multiplies activations and weights of certain types.
pub trait Product<S: Simd> {
    /// Type of activations.
    type A: Float;
    /// Type of weights.
    type W: Float;
    /// k covered by a step.
    const STEP: usize;

    /// `acc[r][v] += a[r][k..k + STEP] * w[v]`, ascending in k.
    ///
    /// # Safety
    /// `a` has R rows and those k; `w` is where V vectors of weights (STEP times as many elements as lanes) start.
    unsafe fn step<const R: usize, const V: usize>(
        simd: S,
        acc: &mut [[S::V; V]; R],
        a: Strided<Self::A>,
        k: usize,
        w: *const Self::W,
    );
}

/// f32 times f32.
pub struct Plain;

impl<S: Simd> Product<S> for Plain {
    type A = f32;
    type W = f32;
    const STEP: usize = 1;

    #[inline(always)]
    unsafe fn step<const R: usize, const V: usize>(
        simd: S,
        acc: &mut [[S::V; V]; R],
        a: Strided<f32>,
        k: usize,
        w: *const f32,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut weights = [simd.zero(); V];
            for (v, weights) in weights.iter_mut().enumerate() {
                *weights = simd.load(w.add(v * S::LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let a = simd.splat(*a.at(r, k));
                for (acc, &w) in acc.iter_mut().zip(&weights) {
                    *acc = simd.fma(a, w, *acc);
                }
            }
        }
    }
}

/// f32 times bf16 pairs, widened in registers: the same multiplications in the same order as [`Plain`] on widened weights.
pub struct Widening;

impl<S: Simd> Product<S> for Widening {
    type A = f32;
    type W = bf16;
    const STEP: usize = 2;

    #[inline(always)]
    unsafe fn step<const R: usize, const V: usize>(
        simd: S,
        acc: &mut [[S::V; V]; R],
        a: Strided<f32>,
        k: usize,
        w: *const bf16,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut weights = [simd.zero(); V];
            for (v, weights) in weights.iter_mut().enumerate() {
                *weights = simd.even(simd.load_pairs(w.add(2 * v * S::LANES)));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let a = simd.splat(*a.at(r, k));
                for (acc, &w) in acc.iter_mut().zip(&weights) {
                    *acc = simd.fma(a, w, *acc);
                }
            }
            for (v, weights) in weights.iter_mut().enumerate() {
                *weights = simd.odd(simd.load_pairs(w.add(2 * v * S::LANES)));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let a = simd.splat(*a.at(r, k + 1));
                for (acc, &w) in acc.iter_mut().zip(&weights) {
                    *acc = simd.fma(a, w, *acc);
                }
            }
        }
    }
}

/// bf16 pairs times bf16 pairs: [`Simd::dot`].
pub struct Pairs;

impl<S: Simd> Product<S> for Pairs {
    type A = bf16;
    type W = bf16;
    const STEP: usize = 2;

    #[inline(always)]
    unsafe fn step<const R: usize, const V: usize>(
        simd: S,
        acc: &mut [[S::V; V]; R],
        a: Strided<bf16>,
        k: usize,
        w: *const bf16,
    ) {
        // SAFETY: the caller's promise; a pair of bf16 is 32 bits, little endian as the lanes are.
        unsafe {
            let mut weights = [simd.splat_pair(0); V];
            for (v, weights) in weights.iter_mut().enumerate() {
                *weights = simd.load_pairs(w.add(2 * v * S::LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let a = simd.splat_pair(a.at(r, k).cast::<u32>().read_unaligned());
                for (acc, &w) in acc.iter_mut().zip(&weights) {
                    *acc = simd.dot(*acc, a, w);
                }
            }
        }
    }
}

/// Activations of one type and the product of them with weights of another.
pub trait Operand<W: Float>: Float {
    /// How they are multiplied.
    type Product<S: Simd>: Product<S, A = Self, W = W>;

    /// Stores `LANES` elements between 0 and 1, rounded; denormals may become 0.
    ///
    /// # Safety
    /// As [`Simd::store`].
    #[inline(always)]
    unsafe fn store_weights<S: Simd>(simd: S, to: *mut Self, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { Self::store(simd, to, v) }
    }
}

impl Operand<f32> for f32 {
    type Product<S: Simd> = Plain;
}
impl Operand<bf16> for f32 {
    type Product<S: Simd> = Widening;
}
impl Operand<bf16> for bf16 {
    type Product<S: Simd> = Pairs;

    #[inline(always)]
    unsafe fn store_weights<S: Simd>(simd: S, to: *mut bf16, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { simd.store_bf16_fast(to, v) }
    }
}

/// Columns of a panel.
pub struct Panel<W> {
    /// The first weight.
    pub start: *const W,
    /// Its k, a whole number of steps.
    pub k: usize,
    /// Columns from one k to the next.
    pub pitch: usize,
    /// What is fetched meanwhile.
    pub ahead: Ahead,
}

/// Weights to be fetched into the cache while others are in use: those of one step, in the columns of the tile, at a time.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// Elements from the first weight in use to the first one to fetch.
    pub distance: usize,
    /// Steps along k from one fetch to the next.
    pub every: usize,
}

impl Ahead {
    /// Each step fetches the weights of the step that is so many elements away.
    pub const fn by(distance: usize) -> Ahead {
        Ahead { distance, every: 1 }
    }

    /// Nothing: what is in the cache already, once.
    pub const NONE: Ahead = Ahead { distance: 0, every: usize::MAX };
}

impl<W> Clone for Panel<W> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<W> Copy for Panel<W> {}

/// Where sums go.
#[derive(Clone, Copy)]
pub struct Sums {
    /// Element (0, 0).
    pub start: *mut f32,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Go on from what is there, instead of from 0.
    pub add: bool,
}

/// `sums[r][j] = sum_k a[r][k] * panel[k][j]` for `rows` rows and `columns` columns, a multiple of [`Simd::LANES`], block after block of k:
/// one block stays in the first-level cache while all rows pass over it, and what lies behind it, of this panel or the next, is on its
/// way meanwhile. Rows whose sums all fit into the registers take it as one block. One block at least, so that sums over
/// nothing are written too. `ONCE`: what is fetched is not used again for long.
///
/// # Safety
/// Rows of activations and of sums, `stride` elements apart, are as large as said, and nobody else touches them meanwhile.
#[inline(always)]
pub unsafe fn product<S: Simd, P: Product<S>, const ONCE: bool>(
    simd: S,
    (a, rows): (Strided<P::A>, usize),
    (panel, columns): (&[P::W], usize),
    (sums, stride): (*mut f32, usize),
) {
    let depth = panel.len() / columns;
    // A tile of all rows and columns meets every weight once. Blocks are of like lengths: a short one would be over before all of the
    // next is fetched.
    let single = rows <= const { tallest::<S>() } && fits::<S>(rows, columns / S::LANES);
    let most = if single { depth } else { block_k::<P::W>(columns) };
    let count = depth.div_ceil(most.max(1)).max(1);
    let length = depth.div_ceil(count).next_multiple_of(P::STEP);
    let mut k = 0;
    loop {
        let block = Block {
            start: panel[k * columns..].as_ptr(),
            k: length.min(depth - k),
            pitch: columns,
            next: length * columns,
        };
        // SAFETY: k lies in the panel, and so in the activations.
        unsafe {
            let a = Strided { start: a.at(0, k), ..a };
            let sums = Sums { start: sums, stride, add: k > 0 };
            strips::<S, P, ONCE>(simd, (a, rows), (block, columns), sums);
        }
        k += length;
        if k >= depth {
            return;
        }
    }
}

/// k of one block of a panel at most: whole pairs.
pub const fn block_k<W>(columns: usize) -> usize {
    BLOCK_BYTES / (columns * size_of::<W>()) / 2 * 2
}

/// One block of a panel.
pub struct Block<W> {
    /// Its first weight.
    pub start: *const W,
    /// Its k, a whole number of steps.
    pub k: usize,
    /// Columns from one k to the next.
    pub pitch: usize,
    /// Elements to the block after it; 0 where that is in the cache anyway, as this one is.
    pub next: usize,
}

/// All rows times one block, strip by strip. A single strip waits for memory anyway and fetches a little ahead. Of several, each fetches its
/// share of the next block, so that memory is as busy during every one of them: in the last alone, fetches would come faster than memory
/// answers, and computing would wait for them.
///
/// # Safety
/// Rows of activations, block and sums are as large as said, and nobody writes them meanwhile.
#[inline(always)]
pub unsafe fn strips<S: Simd, P: Product<S>, const ONCE: bool>(
    simd: S,
    (a, rows): (Strided<P::A>, usize),
    (block, columns): (Block<P::W>, usize),
    sums: Sums,
) {
    let Block { start, k, pitch, next } = block;
    let strips = rows.div_ceil(const { tallest::<S>() });
    let share = k.div_ceil(P::STEP).div_ceil(strips.max(1)) * P::STEP * pitch;
    let mut row = 0;
    for strip in 0..strips {
        // Of like heights: a strip of one row waits for its own sums.
        let height = (rows - row).div_ceil(strips - strip);
        let ahead = match next {
            0 => Ahead::NONE,
            _ if strips == 1 => Ahead::by(AHEAD_BYTES / size_of::<P::W>()),
            next => Ahead { distance: next + strip * share, every: strips },
        };
        // SAFETY: rows [row, row + height) exist; the rest is the caller's promise.
        unsafe {
            let a = Strided { start: a.at(row, 0), ..a };
            let sums = Sums { start: sums.start.add(row * sums.stride), ..sums };
            self::strip::<S, P, ONCE>(simd, (a, height), (Panel { start, k, pitch, ahead }, columns), sums);
        }
        row += height;
    }
}

/// One strip of rows, [`tallest`] at most, times some columns.
///
/// # Safety
/// See [`strips`].
#[inline(always)]
pub unsafe fn strip<S: Simd, P: Product<S>, const ONCE: bool>(
    simd: S,
    (a, rows): (Strided<P::A>, usize),
    (panel, columns): (Panel<P::W>, usize),
    sums: Sums,
) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match rows {
            1 => tiles::<S, P, ONCE, 1>(simd, a, (panel, columns), sums),
            2 => tiles::<S, P, ONCE, 2>(simd, a, (panel, columns), sums),
            3 => tiles::<S, P, ONCE, 3>(simd, a, (panel, columns), sums),
            4 => tiles::<S, P, ONCE, 4>(simd, a, (panel, columns), sums),
            5 => tiles::<S, P, ONCE, 5>(simd, a, (panel, columns), sums),
            6 => tiles::<S, P, ONCE, 6>(simd, a, (panel, columns), sums),
            7 => tiles::<S, P, ONCE, 7>(simd, a, (panel, columns), sums),
            _ => tiles::<S, P, ONCE, 8>(simd, a, (panel, columns), sums),
        }
    }
}

/// R rows, in tiles as wide as registers allow and the columns divide into.
#[inline(always)]
unsafe fn tiles<S: Simd, P: Product<S>, const ONCE: bool, const R: usize>(
    simd: S,
    a: Strided<P::A>,
    (panel, columns): (Panel<P::W>, usize),
    sums: Sums,
) {
    let vectors = columns / S::LANES;
    // SAFETY: the caller's promise, passed on.
    unsafe {
        if const { fits::<S>(R, 6) } && vectors.is_multiple_of(6) {
            row_of_tiles::<S, P, ONCE, R, 6>(simd, a, (panel, vectors), sums);
        } else if const { fits::<S>(R, 4) } && vectors.is_multiple_of(4) {
            row_of_tiles::<S, P, ONCE, R, 4>(simd, a, (panel, vectors), sums);
        } else if const { fits::<S>(R, 3) } && vectors.is_multiple_of(3) {
            row_of_tiles::<S, P, ONCE, R, 3>(simd, a, (panel, vectors), sums);
        } else if const { fits::<S>(R, 2) } && vectors.is_multiple_of(2) {
            row_of_tiles::<S, P, ONCE, R, 2>(simd, a, (panel, vectors), sums);
        } else {
            row_of_tiles::<S, P, ONCE, R, 1>(simd, a, (panel, vectors), sums);
        }
    }
}

/// Sums, weights and one activation fit into the registers, one being left for a constant.
const fn fits<S: Simd>(rows: usize, vectors: usize) -> bool {
    vectors * (rows + 1) + 2 <= S::REGISTERS
}

/// Rows of the tallest strip: as many, up to 8, as leave a tile two vectors wide, so that each activation read is used twice.
pub const fn tallest<S: Simd>() -> usize {
    let mut rows = 8;
    while rows > 1 && !fits::<S>(rows, 2) {
        rows -= 1;
    }
    rows
}

/// R rows times all columns, V vectors at a time.
#[inline(always)]
unsafe fn row_of_tiles<S: Simd, P: Product<S>, const ONCE: bool, const R: usize, const V: usize>(
    simd: S,
    a: Strided<P::A>,
    (panel, vectors): (Panel<P::W>, usize),
    sums: Sums,
) {
    for column in (0..vectors * S::LANES).step_by(V * S::LANES) {
        // SAFETY: the V vectors from `column` on are in the panel.
        unsafe {
            let panel = Panel { start: panel.start.add(column * P::STEP), ..panel };
            tile::<S, P, ONCE, R, V>(simd, a, panel, Sums { start: sums.start.add(column), ..sums });
        }
    }
}

/// R rows times V vectors of columns.
#[inline(always)]
unsafe fn tile<S: Simd, P: Product<S>, const ONCE: bool, const R: usize, const V: usize>(
    simd: S,
    a: Strided<P::A>,
    panel: Panel<P::W>,
    sums: Sums,
) {
    let Panel { start, k, pitch, ahead } = panel;
    let mut acc = [[simd.zero(); V]; R];
    // SAFETY: the caller vouches for R rows of k activations, the panel and R rows of sums.
    unsafe {
        if sums.add {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = simd.load(sums.start.add(r * sums.stride + v * S::LANES));
                }
            }
        }
        let (mut at, mut next) = (0, start.wrapping_add(ahead.distance));
        while at < k {
            for line in 0..V * P::STEP * S::LANES * size_of::<P::W>() / LINE {
                let line = next.wrapping_byte_add(line * LINE).cast();
                if ONCE { simd.prefetch_once(line) } else { simd.prefetch(line) }
            }
            next = next.wrapping_add(P::STEP * pitch);
            let end = k.min(at.saturating_add(ahead.every.saturating_mul(P::STEP)));
            while at < end {
                P::step(simd, &mut acc, a, at, start.add(at * pitch));
                at += P::STEP;
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (v, &acc) in acc.iter().enumerate() {
                simd.store(sums.start.add(r * sums.stride + v * S::LANES), acc);
            }
        }
    }
}
