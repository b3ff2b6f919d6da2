//! Activations times one weight panel: the inner loops of every matrix product.
//!
//! An output element is one chain of additions over k, ascending, from 0, in its own accumulator; blocks of k pass the sum on
//! through memory, which loses nothing. Tiles of other shapes, wide or narrow, only choose which chains run side by side, so
//! they all give the same bits.

use half::bf16;

use super::panel::{PANEL, Panel};
use super::simd::{Kernel, Simd};

/// k of one block where weights are consumed as f32: the block of a panel is 24 KiB and stays in the L1 cache while
/// all rows pass over it.
const BLOCK_F32: usize = 128;
/// k of one block where weights are consumed as bf16 pairs: 24 KiB too.
const BLOCK_PAIRS: usize = 256;
/// From this many rows on, widening a block of weights to f32 once is cheaper than widening in registers for each strip of rows.
const WIDEN_ROWS: usize = 13;

/// f32 of scratch in which [`PanelProduct`] widens weights.
pub const WIDE_LEN: usize = BLOCK_F32 * PANEL;

/// Rows of activations in the form a kernel wants; rows are `stride` elements apart.
#[derive(Clone, Copy)]
pub enum Rows {
    /// f32, or bf16 widened.
    F32 {
        /// Element (0, 0).
        start: *const f32,
        /// Elements from one row to the next.
        stride: usize,
    },
    /// bf16 in whole pairs, for instruction sets with [`Simd::NATIVE_DOT`].
    Pairs {
        /// Element (0, 0).
        start: *const bf16,
        /// Elements from one row to the next.
        stride: usize,
    },
}

// SAFETY: a plain address; whoever follows it answers for it.
unsafe impl Send for Rows {}
// SAFETY: see above.
unsafe impl Sync for Rows {}

impl Rows {
    /// The same rows without the first `rows`.
    pub fn skip(self, rows: usize) -> Rows {
        match self {
            Rows::F32 { start, stride } => Rows::F32 { start: start.wrapping_add(rows * stride), stride },
            Rows::Pairs { start, stride } => Rows::Pairs { start: start.wrapping_add(rows * stride), stride },
        }
    }
}

/// `sums[r][j] = sum_k a[r][k] * panel[k][j]` for all [`PANEL`] columns.
pub struct PanelProduct<'a> {
    a: Rows,
    rows: usize,
    panel: Panel<'a>,
    sums: &'a mut [f32],
    wide: &'a mut [f32],
}

impl<'a> PanelProduct<'a> {
    /// `sums` receives `[rows, PANEL]`; `wide` is scratch of [`WIDE_LEN`].
    ///
    /// # Safety
    /// `a` has `rows` rows of as many valid elements as the panel has k (for a bf16 panel in whole pairs, whatever the type of
    /// `a`), which nobody writes meanwhile.
    pub unsafe fn new(
        a: Rows,
        rows: usize,
        panel: Panel<'a>,
        sums: &'a mut [f32],
        wide: &'a mut [f32],
    ) -> PanelProduct<'a> {
        assert!(sums.len() >= rows * PANEL, "{} sums for {rows} rows", sums.len());
        assert!(wide.len() >= WIDE_LEN, "{} f32 of scratch, {WIDE_LEN} needed", wide.len());
        PanelProduct { a, rows, panel, sums, wide }
    }
}

impl Kernel for PanelProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let PanelProduct { a, rows, panel, sums, wide } = self;
        let sums = sums.as_mut_ptr();
        // SAFETY: `new` was promised the activations and has checked the size of `sums`.
        unsafe {
            match (a, panel) {
                (Rows::F32 { start, stride }, Panel::F32(panel)) => {
                    blocks::<S, Plain>(simd, Strided { start, stride }, rows, panel, BLOCK_F32, sums);
                }
                (Rows::F32 { start, stride }, Panel::Bf16(panel)) if rows >= WIDEN_ROWS => {
                    widened_blocks(simd, Strided { start, stride }, rows, panel, wide, sums);
                }
                (Rows::F32 { start, stride }, Panel::Bf16(panel)) => {
                    blocks::<S, Widening>(simd, Strided { start, stride }, rows, panel, BLOCK_PAIRS, sums);
                }
                (Rows::Pairs { start, stride }, Panel::Bf16(panel)) if S::NATIVE_DOT => {
                    blocks::<S, Native>(simd, Strided { start, stride }, rows, panel, BLOCK_PAIRS, sums);
                }
                (Rows::Pairs { .. }, _) => {
                    panic!("bf16 activations for f32 weights, or where bf16 is widened")
                }
            }
        }
    }
}

/// All rows times a panel, block after block of k; one block at least, so that sums over nothing are written too.
#[inline(always)]
unsafe fn blocks<S: Simd, P: Product<S>>(
    simd: S,
    a: Strided<P::A>,
    rows: usize,
    panel: &[P::W],
    block: usize,
    sums: *mut f32,
) {
    let depth = panel.len() / PANEL;
    let mut k = 0;
    loop {
        let length = block.min(depth - k);
        // SAFETY: k lies in the panel, and so in the activations.
        unsafe {
            let a = Strided { start: a.at(0, k), ..a };
            strips::<S, P>(
                simd,
                a,
                rows,
                Block { w: panel[k * PANEL..].as_ptr(), k: length, first: k == 0 },
                sums,
            );
        }
        k += length;
        if k == depth {
            return;
        }
    }
}

/// [`blocks`] of a bf16 panel, each widened to f32 for all rows.
#[inline(always)]
unsafe fn widened_blocks<S: Simd>(
    simd: S,
    a: Strided<f32>,
    rows: usize,
    panel: &[bf16],
    wide: &mut [f32],
    sums: *mut f32,
) {
    if panel.is_empty() {
        // SAFETY: as this function's.
        return unsafe { blocks::<S, Plain>(simd, a, rows, &[], BLOCK_F32, sums) };
    }
    for (number, pairs) in panel.chunks(BLOCK_F32 * PANEL).enumerate() {
        widen(simd, pairs, wide);
        // SAFETY: the block lies in the panel, and so in the activations.
        unsafe {
            let a = Strided { start: a.at(0, number * BLOCK_F32), ..a };
            let block = Block { w: wide.as_ptr(), k: pairs.len() / PANEL, first: number == 0 };
            strips::<S, Plain>(simd, a, rows, block, sums);
        }
    }
}

/// Unpacks `[k / 2][PANEL][2]` into `[k][PANEL]` f32, exactly.
#[inline(always)]
fn widen<S: Simd>(simd: S, pairs: &[bf16], wide: &mut [f32]) {
    for (from, to) in pairs.chunks_exact(2 * PANEL).zip(wide.chunks_exact_mut(2 * PANEL)) {
        let (even, odd) = to.split_at_mut(PANEL);
        for column in (0..PANEL).step_by(S::LANES) {
            // SAFETY: LANES divides PANEL, so the LANES columns from `column` on exist in all three.
            unsafe {
                let pairs = simd.load_pairs(from.as_ptr().add(2 * column));
                simd.store(even.as_mut_ptr().add(column), simd.even(pairs));
                simd.store(odd.as_mut_ptr().add(column), simd.odd(pairs));
            }
        }
    }
}

/// Where rows of activations start and how far apart they are.
struct Strided<T> {
    start: *const T,
    stride: usize,
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
    unsafe fn at(self, row: usize, k: usize) -> *const T {
        // SAFETY: the caller names an element that exists.
        unsafe { self.start.add(row * self.stride + k) }
    }
}

/// How one step along k multiplies activations and weights of certain types.
trait Product<S: Simd> {
    /// Type of activations.
    type A;
    /// Type of weights.
    type W;
    /// k covered by a step.
    const STEP: usize;

    /// `acc[r][v] += a[r][k..k + STEP] * w[v]`, ascending in k.
    ///
    /// # Safety
    /// `a` has R rows and those k; `w` is the start of STEP * PANEL weights, or that plus some columns.
    unsafe fn step<const R: usize, const V: usize>(
        simd: S,
        acc: &mut [[S::V; V]; R],
        a: Strided<Self::A>,
        k: usize,
        w: *const Self::W,
    );
}

/// f32 times f32.
struct Plain;

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
struct Widening;

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

/// bf16 pairs times bf16 pairs, in one instruction.
struct Native;

impl<S: Simd> Product<S> for Native {
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

/// One block of a panel.
struct Block<W> {
    /// Its first weight.
    w: *const W,
    /// Its k.
    k: usize,
    /// It is the panel's first: sums start from 0. Otherwise they go on from where the last block left them.
    first: bool,
}

impl<W> Clone for Block<W> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<W> Copy for Block<W> {}

/// All rows times one block, strip by strip.
#[inline(always)]
unsafe fn strips<S: Simd, P: Product<S>>(
    simd: S,
    a: Strided<P::A>,
    rows: usize,
    block: Block<P::W>,
    sums: *mut f32,
) {
    let mut row = 0;
    while row < rows {
        let height = const { tallest::<S>() }.min(rows - row);
        // SAFETY: rows [row, row + height) exist; the rest is the caller's promise.
        unsafe {
            let a = Strided { start: a.at(row, 0), ..a };
            let sums = sums.add(row * PANEL);
            match height {
                1 => strip::<S, P, 1>(simd, a, block, sums),
                2 => strip::<S, P, 2>(simd, a, block, sums),
                3 => strip::<S, P, 3>(simd, a, block, sums),
                4 => strip::<S, P, 4>(simd, a, block, sums),
                5 => strip::<S, P, 5>(simd, a, block, sums),
                6 => strip::<S, P, 6>(simd, a, block, sums),
                7 => strip::<S, P, 7>(simd, a, block, sums),
                _ => strip::<S, P, 8>(simd, a, block, sums),
            }
        }
        row += height;
    }
}

/// R rows times one block, in tiles as wide as the registers allow.
#[inline(always)]
unsafe fn strip<S: Simd, P: Product<S>, const R: usize>(
    simd: S,
    a: Strided<P::A>,
    block: Block<P::W>,
    sums: *mut f32,
) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match const { widest::<S>(R) } {
            6 => tiles::<S, P, R, 6>(simd, a, block, sums),
            3 => tiles::<S, P, R, 3>(simd, a, block, sums),
            2 => tiles::<S, P, R, 2>(simd, a, block, sums),
            _ => tiles::<S, P, R, 1>(simd, a, block, sums),
        }
    }
}

/// Vectors side by side in a tile of `rows` rows: they divide a panel, and sums, weights and one activation fit into the registers, one
/// being left for a constant.
const fn widest<S: Simd>(rows: usize) -> usize {
    let panel = PANEL / S::LANES;
    let mut vectors = 6;
    while vectors > 1 && (vectors * (rows + 1) + 2 > S::REGISTERS || !panel.is_multiple_of(vectors)) {
        vectors -= 1;
    }
    vectors
}

/// Rows of the tallest strip: as many, up to 8, as leave a tile two vectors wide, so that each activation read is used twice.
const fn tallest<S: Simd>() -> usize {
    let mut rows = 8;
    while rows > 1 && widest::<S>(rows) < 2 {
        rows -= 1;
    }
    rows
}

/// R rows times one block, tile by tile.
#[inline(always)]
unsafe fn tiles<S: Simd, P: Product<S>, const R: usize, const V: usize>(
    simd: S,
    a: Strided<P::A>,
    block: Block<P::W>,
    sums: *mut f32,
) {
    for column in (0..PANEL).step_by(V * S::LANES) {
        // SAFETY: the V vectors from `column` on are in the panel.
        unsafe {
            let block = Block { w: block.w.add(column * P::STEP), ..block };
            tile::<S, P, R, V>(simd, a, block, sums.add(column));
        }
    }
}

/// The register tile: R rows times V vectors of columns over one block.
#[inline(always)]
unsafe fn tile<S: Simd, P: Product<S>, const R: usize, const V: usize>(
    simd: S,
    a: Strided<P::A>,
    block: Block<P::W>,
    sums: *mut f32,
) {
    let Block { w, k, first } = block;
    let mut acc = [[simd.zero(); V]; R];
    // SAFETY: the caller vouches for R rows of k activations, the block of weights and R rows of sums.
    unsafe {
        if !first {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = simd.load(sums.add(r * PANEL + v * S::LANES));
                }
            }
        }
        let mut at = 0;
        while at < k {
            P::step(simd, &mut acc, a, at, w.add(at * PANEL));
            at += P::STEP;
        }
        for (r, acc) in acc.iter().enumerate() {
            for (v, &acc) in acc.iter().enumerate() {
                simd.store(sums.add(r * PANEL + v * S::LANES), acc);
            }
        }
    }
}
