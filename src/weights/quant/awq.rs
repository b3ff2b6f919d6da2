//! AutoAWQ's "gemm" layout, 4 bits: `w[o, i] = (q - z) * s` with zero and scale of i's group. Words hold 8 outputs
//! of one input in a shuffled order.

use super::{Float, NIBBLES, groups_of_blocks, word};
use crate::backend::quantized::{Group, Quantized, Scales};
use std::ops::Range;

/// Output, within its word, of each nibble from the low bits up.
const ORDER: [usize; NIBBLES] = [0, 2, 4, 6, 1, 3, 5, 7];

/// See the module.
#[derive(Debug, Clone, Copy)]
pub struct Awq<'a> {
    qweight: &'a [u8],
    qzeros: &'a [u8],
    scales: &'a [u8],
    scale_type: Float,
    n: usize,
    group: usize,
}

impl<'a> Awq<'a> {
    /// `qweight` I32 `[k, n / 8]`, `qzeros` I32 `[ceil(k / group), n / 8]`, `scales` `[ceil(k / group), n]`.
    ///
    /// # Panics
    /// When a length is not that of its shape, 8 does not divide n, or the group is empty.
    pub fn new(
        qweight: &'a [u8],
        qzeros: &'a [u8],
        scales: &'a [u8],
        scale_type: Float,
        [n, k]: [usize; 2],
        group: usize,
    ) -> Awq<'a> {
        assert!(group > 0 && n.is_multiple_of(NIBBLES), "AWQ [{n}, {k}] in groups of {group}");
        let groups = k.div_ceil(group);
        assert_eq!(qweight.len(), k * n / 2, "AWQ qweight of [{n}, {k}]");
        assert_eq!(qzeros.len(), groups * n / 2, "AWQ qzeros of [{n}, {k}] in groups of {group}");
        assert_eq!(scales.len(), groups * n * scale_type.bytes(), "AWQ scales of [{n}, {k}]");
        Awq { qweight, qzeros, scales, scale_type, n, group }
    }

    /// Writes the block, row-major. Walks word columns group by group: a word column is gathered once for its 8 rows.
    pub fn block(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let words_per_input = self.n / NIBBLES;
        let mut words = Vec::with_capacity(self.group.min(cols.len()));
        let mut col = cols.start;
        while col < cols.end {
            let group = col / self.group;
            let end = ((group + 1) * self.group).min(cols.end);
            for column in rows.start / NIBBLES..rows.end.div_ceil(NIBBLES) {
                words.clear();
                words.extend((col..end).map(|input| word(self.qweight, input * words_per_input + column)));
                let zeros = word(self.qzeros, group * words_per_input + column);
                for (nibble, lane) in ORDER.into_iter().enumerate() {
                    let row = column * NIBBLES + lane;
                    if !rows.contains(&row) {
                        continue;
                    }
                    let zero = ((zeros >> (4 * nibble)) & 15) as f32;
                    let scale = self.scale_type.get(self.scales, group * self.n + row);
                    let start = (row - rows.start) * cols.len();
                    let out = &mut out[start + col - cols.start..start + end - cols.start];
                    for (out, word) in out.iter_mut().zip(&words) {
                        *out = (((word >> (4 * nibble)) & 15) as f32 - zero) * scale;
                    }
                }
            }
            col = end;
        }
    }
    /// The block as it is stored, unless 128 inputs of it have several groups or a scale has too many bits.
    pub fn quantized(&self, rows: Range<usize>, cols: Range<usize>) -> Option<Quantized> {
        let words_per_input = self.n / NIBBLES;
        let blocks = groups_of_blocks(cols.len(), |input| (cols.start + input) / self.group)?;
        let nibble =
            |row: usize| ORDER.iter().position(|&lane| lane == row % NIBBLES).expect("a permutation");
        let group = |(row, group): (usize, usize)| {
            let zeros = word(self.qzeros, group * words_per_input + row / NIBBLES);
            let scale = self.scale_type.get(self.scales, group * self.n + row);
            Group::new(scale, (zeros >> (4 * nibble(row))) & 15)
        };
        let all = rows.clone().flat_map(|row| blocks.iter().map(move |&group| (row, group)));
        let groups = all.map(group).collect::<Option<Vec<_>>>()?;
        let mut codes = vec![0; rows.len() * cols.len()];
        let mut words = Vec::with_capacity(cols.len());
        for column in rows.start / NIBBLES..rows.end.div_ceil(NIBBLES) {
            words.clear();
            words.extend(cols.clone().map(|input| word(self.qweight, input * words_per_input + column)));
            for row in (column * NIBBLES..(column + 1) * NIBBLES).filter(|row| rows.contains(row)) {
                let shift = 4 * nibble(row);
                let codes = &mut codes[(row - rows.start) * cols.len()..][..cols.len()];
                for (code, word) in codes.iter_mut().zip(&words) {
                    *code = ((word >> shift) & 15) as u8;
                }
            }
        }
        Some(Quantized::new(rows.len(), cols.len(), codes, Scales::I4(groups)))
    }
}
