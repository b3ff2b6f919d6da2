//! AutoGPTQ's v1 layout, 4 bits: `w[o, i] = (q - z) * s` with zero and scale of group `g_idx[i]`. Words hold 8 inputs
//! of one output; zeros are stored as z - 1 (so z may be 16). With `desc_act` groups are not runs of inputs.

use super::{Float, NIBBLES, groups_of_blocks, word};
use crate::backend::quantized::{Group, Quantized, Scales};
use std::ops::Range;

/// Outputs handled together, so that zeros and scales of all groups are unpacked once for each.
const ROW_TILE: usize = 64;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub struct Gptq<'a> {
    qweight: &'a [u8],
    qzeros: &'a [u8],
    scales: &'a [u8],
    scale_type: Float,
    g_idx: Option<&'a [u8]>,
    shape: [usize; 2],
    group: usize,
}

/// A `g_idx` entry that names no group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadGroup {
    /// Input at fault.
    pub input: usize,
    /// Its group as stored.
    pub group: i32,
    /// Groups there are.
    pub groups: usize,
}

impl<'a> Gptq<'a> {
    /// `qweight` I32 `[ceil(k / 8), n]`, `qzeros` I32 `[groups, ceil(n / 8)]`, `scales` `[groups, n]` and `g_idx` I32
    /// `[k]`, where groups are `ceil(k / group)`. Without `g_idx` groups are runs of inputs.
    ///
    /// # Panics
    /// When a length is not that of its shape, or the group is empty.
    pub fn new(
        [qweight, qzeros, scales]: [&'a [u8]; 3],
        g_idx: Option<&'a [u8]>,
        scale_type: Float,
        shape @ [n, k]: [usize; 2],
        group: usize,
    ) -> Gptq<'a> {
        assert!(group > 0, "GPTQ [{n}, {k}] in groups of {group}");
        let groups = k.div_ceil(group);
        assert_eq!(qweight.len(), k.div_ceil(NIBBLES) * n * 4, "GPTQ qweight of [{n}, {k}]");
        assert_eq!(qzeros.len(), groups * n.div_ceil(NIBBLES) * 4, "GPTQ qzeros of [{n}, {k}]");
        assert_eq!(scales.len(), groups * n * scale_type.bytes(), "GPTQ scales of [{n}, {k}]");
        assert!(g_idx.is_none_or(|g_idx| g_idx.len() == k * 4), "GPTQ g_idx of [{n}, {k}]");
        Gptq { qweight, qzeros, scales, scale_type, g_idx, shape, group }
    }

    /// The group of each of some inputs.
    ///
    /// # Errors
    /// When `g_idx` names a group that is not there.
    pub fn groups_of(&self, inputs: Range<usize>) -> Result<Vec<usize>, BadGroup> {
        let groups = self.shape[1].div_ceil(self.group);
        let group_of = |input| match self.g_idx {
            None => Ok(input / self.group),
            Some(g_idx) => {
                let group = word(g_idx, input) as i32;
                usize::try_from(group).ok().filter(|&g| g < groups).ok_or(BadGroup { input, group, groups })
            }
        };
        inputs.map(group_of).collect()
    }

    /// Writes the block, row-major.
    ///
    /// # Errors
    /// When `g_idx` names a group that is not there.
    pub fn block(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) -> Result<(), BadGroup> {
        let n = self.shape[0];
        let group_of = self.groups_of(cols.clone())?;
        let groups = self.shape[1].div_ceil(self.group);
        let mut params = vec![(0.0f32, 0.0f32); groups * ROW_TILE];
        for tile in rows.clone().step_by(ROW_TILE) {
            let tile = tile..(tile + ROW_TILE).min(rows.end);
            for (group, params) in params.chunks_exact_mut(ROW_TILE).enumerate() {
                for (row, param) in tile.clone().zip(params) {
                    let zeros = word(self.qzeros, group * n.div_ceil(NIBBLES) + row / NIBBLES);
                    let zero = ((zeros >> (4 * (row % NIBBLES))) & 15) + 1;
                    *param = (zero as f32, self.scale_type.get(self.scales, group * n + row));
                }
            }
            // Inputs that share a word lie side by side in `out`: each word is read once.
            let mut start = cols.start;
            while start < cols.end {
                let end = ((start / NIBBLES + 1) * NIBBLES).min(cols.end);
                let groups = &group_of[start - cols.start..end - cols.start];
                for (lane, row) in tile.clone().enumerate() {
                    let word = word(self.qweight, start / NIBBLES * n + row);
                    let out =
                        &mut out[(row - rows.start) * cols.len() + start - cols.start..][..groups.len()];
                    for ((out, input), &group) in out.iter_mut().zip(start..).zip(groups) {
                        let (zero, scale) = params[group * ROW_TILE + lane];
                        let q = (word >> (4 * (input % NIBBLES))) & 15;
                        *out = (q as f32 - zero) * scale;
                    }
                }
                start = end;
            }
        }
        Ok(())
    }
    /// The block as it is stored, unless 128 inputs of it have several groups, as with `desc_act`, or a scale has too many bits.
    pub fn quantized(&self, rows: Range<usize>, cols: Range<usize>) -> Option<Quantized> {
        let n = self.shape[0];
        let group_of = self.groups_of(cols.clone()).ok()?;
        let blocks = groups_of_blocks(cols.len(), |input| group_of[input])?;
        let group = |(row, group): (usize, usize)| {
            let zeros = word(self.qzeros, group * n.div_ceil(NIBBLES) + row / NIBBLES);
            let scale = self.scale_type.get(self.scales, group * n + row);
            Group::new(scale, ((zeros >> (4 * (row % NIBBLES))) & 15) + 1)
        };
        let all = rows.clone().flat_map(|row| blocks.iter().map(move |&group| (row, group)));
        let groups = all.map(group).collect::<Option<Vec<_>>>()?;
        let mut codes = vec![0; rows.len() * cols.len()];
        for tile in rows.clone().step_by(ROW_TILE) {
            for input in cols.clone() {
                let words = input / NIBBLES * n;
                for row in tile..(tile + ROW_TILE).min(rows.end) {
                    let code = (word(self.qweight, words + row) >> (4 * (input % NIBBLES))) & 15;
                    codes[(row - rows.start) * cols.len() + input - cols.start] = code as u8;
                }
            }
        }
        Some(Quantized::new(rows.len(), cols.len(), codes, Scales::I4(groups)))
    }
}
