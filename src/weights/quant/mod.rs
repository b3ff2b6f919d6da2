//! Storage formats of matrices. Each type borrows the stored bytes of one matrix `[n, k]` (n outputs, k inputs) and
//! dequantises any block of it, exactly in f32, touching only that block's bytes. Lengths are checked by
//! `super::stored` before a value is made; constructors assert them.

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

/// 4-bit values in one 32-bit word: inputs of one output in [`Gptq`], outputs of one input in [`Awq`].
pub const NIBBLES: usize = 8;

/// The little-endian 32-bit word at index `i`.
fn word(bytes: &[u8], i: usize) -> u32 {
    let at = i * 4;
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests;
