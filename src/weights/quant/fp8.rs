//! float8_e4m3fn with one scale per block (DeepSeek-V3): `w = q * weight_scale_inv[row / block, col / block]`.
//! Blocks at the lower and right edge may be short.

use super::Float;
use std::ops::Range;

/// Values of all 256 codes: sign, 4 exponent bits (bias 7), 3 mantissa bits, no infinities; 0x7f and 0xff are NaN
/// (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433).
pub(super) const E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = decode(code as u8);
        code += 1;
    }
    table
};

const fn decode(code: u8) -> f32 {
    let exponent = (code >> 3) & 15;
    let mantissa = code & 7;
    if exponent == 15 && mantissa == 7 {
        return f32::NAN;
    }
    // Subnormals are mantissa * 2^-9; the others (8 + mantissa) * 2^(exponent - 10).
    let (units, shift) = if exponent == 0 { (mantissa, -9) } else { (8 + mantissa, exponent as i32 - 10) };
    let magnitude = units as f32 * f32::from_bits(((127 + shift) as u32) << 23);
    if code >= 128 { -magnitude } else { magnitude }
}

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
}
