//! Activations times one weight panel, in whatever types they are.

use half::bf16;

use super::panel::{PANEL, Panel, Weights};
use super::product::{BLOCK_BYTES, Block, Pairs, Plain, Strided, Sums, Widening, block_k, product, strips};
use super::simd::{Kernel, MAX_LANES, Simd};

/// From this many rows on, widening a block of weights to f32 once is cheaper than widening in registers for each strip of rows.
const WIDEN_ROWS: usize = 13;

/// Columns of a last panel between the smallest and a whole one.
const TWO_VECTORS: usize = 2 * MAX_LANES;

/// f32 of scratch in which [`PanelProduct`] widens weights.
pub const WIDE_LEN: usize = BLOCK_BYTES / size_of::<f32>();

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
                    let a = (Strided { start, stride }, rows);
                    product::<S, Plain, true>(simd, a, (panel, C), (sums, PANEL));
                }
                (Rows::F32 { start, stride }, Weights::Bf16(panel)) if rows >= WIDEN_ROWS => {
                    widened::<S, C>(simd, (Strided { start, stride }, rows), panel, wide, sums);
                }
                (Rows::F32 { start, stride }, Weights::Bf16(panel)) => {
                    let a = (Strided { start, stride }, rows);
                    product::<S, Widening, true>(simd, a, (panel, C), (sums, PANEL));
                }
                (Rows::Pairs { start, stride }, Weights::Bf16(panel)) if S::NATIVE_DOT => {
                    let a = (Strided { start, stride }, rows);
                    product::<S, Pairs, true>(simd, a, (panel, C), (sums, PANEL));
                }
                (Rows::Pairs { .. }, _) => {
                    panic!("bf16 activations for f32 weights, or where bf16 is widened")
                }
            }
        }
    }
}

/// [`product`] with a bf16 panel, of which each block is widened to f32 for all rows.
#[inline(always)]
unsafe fn widened<S: Simd, const C: usize>(
    simd: S,
    (a, rows): (Strided<f32>, usize),
    panel: &[bf16],
    wide: &mut [f32],
    sums: *mut f32,
) {
    if panel.is_empty() {
        // SAFETY: as this function's.
        return unsafe { product::<S, Plain, true>(simd, (a, rows), (&[], C), (sums, PANEL)) };
    }
    let length = const { block_k::<f32>(C) };
    for (number, pairs) in panel.chunks(length * C).enumerate() {
        widen::<S, C>(simd, pairs, wide);
        // SAFETY: the block lies in the panel, and so in the activations.
        unsafe {
            let a = Strided { start: a.at(0, number * length), ..a };
            let block = Block { start: wide.as_ptr(), k: pairs.len() / C, pitch: C, next: 0 };
            let sums = Sums { start: sums, stride: PANEL, add: number > 0 };
            strips::<S, Plain, true>(simd, (a, rows), (block, C), sums);
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
