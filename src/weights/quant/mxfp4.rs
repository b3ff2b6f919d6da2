//! MXFP4 as gpt-oss stores it: blocks of 32 inputs, 16 bytes with two e2m1 values each (low nibble first), and one
//! power-of-two scale per block (OCP Microscaling Formats specification v1.0).

use std::ops::Range;

/// Inputs of one block.
pub const BLOCK: usize = 32;
/// Bytes of one block.
const BLOCK_BYTES: usize = BLOCK / 2;
/// Values of all e2m1 codes.
const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// See the module. Output `row` is stored row `first + row * step` (gate and up rows alternate).
#[derive(Debug, Clone, Copy)]
pub struct Mxfp4<'a> {
    blocks: &'a [u8],
    scales: &'a [u8],
    blocks_per_row: usize,
    first: usize,
    step: usize,
}

impl<'a> Mxfp4<'a> {
    /// `blocks` U8 `[stored rows, ceil(k / 32), 16]` and `scales` U8 `[stored rows, ceil(k / 32)]`.
    ///
    /// # Panics
    /// When the two lengths do not fit each other.
    pub fn new(blocks: &'a [u8], scales: &'a [u8], k: usize, first: usize, step: usize) -> Mxfp4<'a> {
        assert_eq!(blocks.len(), scales.len() * BLOCK_BYTES, "MXFP4 blocks and scales");
        Mxfp4 { blocks, scales, blocks_per_row: k.div_ceil(BLOCK), first, step }
    }

    /// Writes the block, row-major.
    pub fn block(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
            let stored = self.first + row * self.step;
            let mut col = cols.start;
            while col < cols.end {
                let end = ((col / BLOCK + 1) * BLOCK).min(cols.end);
                let at = stored * self.blocks_per_row + col / BLOCK;
                let scale = power_of_two(self.scales[at]);
                let bytes = &self.blocks[at * BLOCK_BYTES..(at + 1) * BLOCK_BYTES];
                for (out, col) in out[col - cols.start..end - cols.start].iter_mut().zip(col..) {
                    let code = bytes[col % BLOCK / 2] >> (4 * (col % 2));
                    *out = E2M1[usize::from(code & 15)] * scale;
                }
                col = end;
            }
        }
    }
}

/// e8m0: 2^(code - 127); 255 is NaN.
pub(super) fn power_of_two(code: u8) -> f32 {
    match code {
        255 => f32::NAN,
        // 2^-127 is a subnormal f32.
        0 => f32::from_bits(1 << 22),
        _ => f32::from_bits(u32::from(code) << 23),
    }
}
