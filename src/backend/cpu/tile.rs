//! Activations times one weight panel, block after block of k: each block stays in the first-level cache while all rows
//! pass over it, and the next one is on its way meanwhile.

use half::bf16;

use super::panel::{PANEL, Panel, Weights};
use super::product::{self, Ahead, Pairs, Plain, Product, Strided, Sums, Widening, tallest};
use super::simd::{Kernel, MAX_LANES, Simd};

/// Bytes of one block of a panel at most: it, the next one and the rows fit into a first-level cache of 48 KiB, and sums seldom leave the
/// registers.
const BLOCK_BYTES: usize = 18 << 10;
/// How far ahead a single strip of rows fetches weights: somewhat more than what arrives from memory in the time of one access.
const AHEAD_BYTES: usize = 8 << 10;
/// From this many rows on, widening a block of weights to f32 once is cheaper than widening in registers for each strip of rows.
const WIDEN_ROWS: usize = 13;

/// Columns of a last panel between the smallest and a whole one.
const TWO_VECTORS: usize = 2 * MAX_LANES;

/// f32 of scratch in which [`PanelProduct`] widens weights.
pub const WIDE_LEN: usize = BLOCK_BYTES / size_of::<f32>();

/// k of one block at most, of a panel of [`PANEL`] columns of weights as they are consumed: whole pairs.
const fn block_k<W>() -> usize {
    BLOCK_BYTES / (PANEL * size_of::<W>())
}

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

/// `sums[r][j] = sum_k a[r][k] * panel[k][j]` for all columns of the panel; rows of sums are [`PANEL`] apart.
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
        match self.panel.columns {
            PANEL => self.columns::<S, PANEL>(simd),
            TWO_VECTORS => self.columns::<S, TWO_VECTORS>(simd),
            MAX_LANES => self.columns::<S, MAX_LANES>(simd),
            columns => panic!("a panel of {columns} columns"),
        }
    }
}

impl PanelProduct<'_> {
    /// The product with a panel of `C` columns.
    #[inline(always)]
    fn columns<S: Simd, const C: usize>(self, simd: S) {
        let PanelProduct { a, rows, panel, sums, wide } = self;
        let sums = sums.as_mut_ptr();
        // SAFETY: `new` was promised the activations and has checked the size of `sums`.
        unsafe {
            match (a, panel.weights) {
                (Rows::F32 { start, stride }, Weights::F32(panel)) => {
                    blocks::<S, Plain, C>(simd, Strided { start, stride }, rows, panel, sums);
                }
                (Rows::F32 { start, stride }, Weights::Bf16(panel)) if rows >= WIDEN_ROWS => {
                    widened_blocks::<S, C>(simd, Strided { start, stride }, rows, panel, wide, sums);
                }
                (Rows::F32 { start, stride }, Weights::Bf16(panel)) => {
                    blocks::<S, Widening, C>(simd, Strided { start, stride }, rows, panel, sums);
                }
                (Rows::Pairs { start, stride }, Weights::Bf16(panel)) if S::NATIVE_DOT => {
                    blocks::<S, Pairs, C>(simd, Strided { start, stride }, rows, panel, sums);
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
unsafe fn blocks<S: Simd, P: Product<S>, const C: usize>(
    simd: S,
    a: Strided<P::A>,
    rows: usize,
    panel: &[P::W],
    sums: *mut f32,
) {
    let depth = panel.len() / C;
    // Of like lengths: a short one would be over before all of the next is fetched.
    let count = depth.div_ceil(const { block_k::<P::W>() }).max(1);
    let block = depth.div_ceil(count).next_multiple_of(P::STEP);
    let mut k = 0;
    loop {
        let length = block.min(depth - k);
        // SAFETY: k lies in the panel, and so in the activations.
        unsafe {
            let a = Strided { start: a.at(0, k), ..a };
            strips::<S, P, C>(
                simd,
                a,
                rows,
                Block { w: panel[k * C..].as_ptr(), k: length, first: k == 0, next: block * C },
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
unsafe fn widened_blocks<S: Simd, const C: usize>(
    simd: S,
    a: Strided<f32>,
    rows: usize,
    panel: &[bf16],
    wide: &mut [f32],
    sums: *mut f32,
) {
    if panel.is_empty() {
        // SAFETY: as this function's.
        return unsafe { blocks::<S, Plain, C>(simd, a, rows, &[], sums) };
    }
    let block = const { block_k::<f32>() };
    for (number, pairs) in panel.chunks(block * C).enumerate() {
        widen::<S, C>(simd, pairs, wide);
        // SAFETY: the block lies in the panel, and so in the activations.
        unsafe {
            let a = Strided { start: a.at(0, number * block), ..a };
            let block = Block { w: wide.as_ptr(), k: pairs.len() / C, first: number == 0, next: 0 };
            strips::<S, Plain, C>(simd, a, rows, block, sums);
        }
    }
}

/// Unpacks `[k / 2][C][2]` into `[k][C]` f32, exactly.
#[inline(always)]
fn widen<S: Simd, const C: usize>(simd: S, pairs: &[bf16], wide: &mut [f32]) {
    for (from, to) in pairs.chunks_exact(2 * C).zip(wide.chunks_exact_mut(2 * C)) {
        let (even, odd) = to.split_at_mut(C);
        for column in (0..C).step_by(S::LANES) {
            // SAFETY: LANES divides C, so the LANES columns from `column` on exist in all three.
            unsafe {
                let pairs = simd.load_pairs(from.as_ptr().add(2 * column));
                simd.store(even.as_mut_ptr().add(column), simd.even(pairs));
                simd.store(odd.as_mut_ptr().add(column), simd.odd(pairs));
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
    /// Elements to the block after it; 0 where it is in the cache anyway, as the block is.
    next: usize,
}

/// All rows times one block, strip by strip. A single strip waits for memory anyway and fetches a little ahead. Of several, each fetches its
/// share of the next block, so that memory is as busy during every one of them: in the last alone, fetches would come faster than memory
/// answers, and computing would wait for them.
#[inline(always)]
unsafe fn strips<S: Simd, P: Product<S>, const C: usize>(
    simd: S,
    a: Strided<P::A>,
    rows: usize,
    block: Block<P::W>,
    sums: *mut f32,
) {
    let strips = rows.div_ceil(const { tallest::<S>() });
    let share = block.k.div_ceil(P::STEP).div_ceil(strips.max(1)) * P::STEP * C;
    let mut row = 0;
    for strip in 0..strips {
        // Of like heights: a strip of one row waits for its own sums.
        let height = (rows - row).div_ceil(strips - strip);
        let ahead = match block.next {
            0 => Ahead::NONE,
            _ if strips == 1 => Ahead::by(AHEAD_BYTES / size_of::<P::W>()),
            next => Ahead { distance: next + strip * share, every: strips },
        };
        // SAFETY: rows [row, row + height) exist; the rest is the caller's promise.
        unsafe {
            let a = Strided { start: a.at(row, 0), ..a };
            let panel = product::Panel { start: block.w, k: block.k, pitch: C, ahead };
            let sums = Sums { start: sums.add(row * PANEL), stride: PANEL, add: !block.first };
            product::strip::<S, P, true>(simd, (a, height), (panel, C), sums);
        }
        row += height;
    }
}
