//! float8_e4m3fn with one scale per block (DeepSeek-V3): `w = q * weight_scale_inv[row / block, col / block]`.
//! Blocks at the lower and right edge may be short.

use super::Float;
use crate::backend::quantized::{BLOCK, E4M3, Quantized, Scales};
use std::ops::Range;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub struct Fp8<'a> {
    codes: &'a [u8],
    scales: &'a [u8],
    scale_type: Float,
    k: usize,
    block: [usize; 2],
}

impl<'a> Fp8<'a> {
    /// `codes` `[n, k]`; `scales` `[ceil(n / block[0]), ceil(k / block[1])]`.
    ///
    /// # Panics
    /// When a length is not that of its shape, or a block is empty.
    pub fn new(
        codes: &'a [u8],
        scales: &'a [u8],
        scale_type: Float,
        [n, k]: [usize; 2],
        block: [usize; 2],
    ) -> Fp8<'a> {
        assert!(block[0] > 0 && block[1] > 0, "fp8 block {block:?}");
        assert_eq!(codes.len(), n * k, "fp8 codes of [{n}, {k}]");
        let blocks = n.div_ceil(block[0]) * k.div_ceil(block[1]);
        assert_eq!(scales.len(), blocks * scale_type.bytes(), "fp8 scales of [{n}, {k}]");
        Fp8 { codes, scales, scale_type, k, block }
    }

    /// Writes the block, row-major.
    pub fn block(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let [block_rows, block_cols] = self.block;
        let scales_per_row = self.k.div_ceil(block_cols);
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
            let mut col = cols.start;
            while col < cols.end {
                let end = ((col / block_cols + 1) * block_cols).min(cols.end);
                let at = row / block_rows * scales_per_row + col / block_cols;
                let scale = self.scale_type.get(self.scales, at);
                let codes = &self.codes[row * self.k + col..row * self.k + end];
                for (out, &code) in out[col - cols.start..end - cols.start].iter_mut().zip(codes) {
                    *out = E4M3[code as usize] * scale;
                }
                col = end;
            }
        }
    }
    /// The block as it is stored, unless its scales are for blocks of another size or it cuts through one.
    pub fn quantized(&self, rows: Range<usize>, cols: Range<usize>) -> Option<Quantized> {
        let starts = [rows.start, cols.start];
        if self.block != [BLOCK; 2] || starts.iter().any(|start| !start.is_multiple_of(BLOCK)) {
            return None;
        }
        let codes = rows.clone().flat_map(|row| &self.codes[row * self.k..][cols.clone()]).copied().collect();
        let per_row = self.k.div_ceil(BLOCK);
        let scale =
            |row: usize, col: usize| self.scale_type.get(self.scales, row / BLOCK * per_row + col / BLOCK);
        let scales = rows
            .clone()
            .step_by(BLOCK)
            .flat_map(|row| cols.clone().step_by(BLOCK).map(move |col| (row, col)));
        let scales = scales.map(|(row, col)| scale(row, col)).collect();
        Some(Quantized::new(rows.len(), cols.len(), codes, Scales::F8(scales)))
    }
}
