//! Storage formats of matrices. Each type borrows the stored bytes of one matrix `[n, k]` (n outputs, k inputs) and
//! dequantises any block of it, exactly in f32, touching only that block's bytes; `quantized` hands a block out as it is stored, where
//! [`crate::backend::quantized`] has its form. Lengths are checked by `super::stored` before a value is made; constructors assert them.

mod awq;
mod fp8;
mod gptq;
mod mxfp4;
mod plain;

pub use awq::Awq;
pub use fp8::Fp8;
pub use gptq::{BadGroup, Gptq};
pub use mxfp4::{BLOCK as MXFP4_BLOCK, Mxfp4};
pub use plain::{Float, Plain};

use crate::backend::quantized::BLOCK;

/// 4-bit values in one 32-bit word: inputs of one output in [`Gptq`], outputs of one input in [`Awq`].
pub const NIBBLES: usize = 8;

/// The group of each run of 128 inputs, unless one has inputs of several: `group_of` tells that of an input, counted from the first.
fn groups_of_blocks(inputs: usize, group_of: impl Fn(usize) -> usize) -> Option<Vec<usize>> {
    let block = |start: usize| {
        let group = group_of(start);
        (start..inputs.min(start + BLOCK)).all(|input| group_of(input) == group).then_some(group)
    };
    (0..inputs).step_by(BLOCK).map(block).collect()
}

/// The little-endian 32-bit word at index `i`.
fn word(bytes: &[u8], i: usize) -> u32 {
    let at = i * 4;
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests;
