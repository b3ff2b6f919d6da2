//! Experts in fp8 and in 4 bits: what the numbers are. Unlike those of [`super::int8`], only the weights are quantised: each code stands
//! for a number in bf16, and a product is that of bf16 with these numbers, bit for bit.
//!
//! * [`DType::F8`]: float8_e4m3fn with one scale in f32 for each block of 128 outputs by 128 inputs, as DeepSeek-V3 is published:
//!   `weight = bf16(f32(code * scale))`.
//! * [`DType::I4x2`]: 0 to 15 with a [`Group`] of scale and zero for each output and 128 inputs, as AWQ and GPTQ have them:
//!   `weight = bf16((code - zero) * scale)`, rounded once.
//!
//! Blocks at the lower and right edge may be short. Weights that are stored in one of these forms keep their codes and scales, so they
//! have the bits of a run without quantisation; [`Quantized::of`] makes them from any others. A block or group with a number that is not
//! finite has a scale that is NaN, so that whatever is made of it is NaN too.

mod e4m3;
mod group;

use std::ops::Range;

use half::bf16;

use super::DType;
pub use e4m3::E4M3;
pub use group::Group;

/// Inputs with one scale; in [`DType::F8`] outputs too.
pub const BLOCK: usize = 128;

/// Where nothing of a block or group reaches this magnitude, all of it is 0: the inverse of its scale would not be finite.
const SMALLEST: f32 = 1e-30;

/// Greatest magnitude of float8_e4m3fn.
const GREATEST: f32 = 448.0;

/// A matrix `[n, k]` in one of the forms of this module.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    n: usize,
    k: usize,
    codes: Vec<u8>,
    scales: Scales,
}

/// Scales by row of blocks or by output, then by block along k.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// `[ceil(n / 128), ceil(k / 128)]`; codes are float8_e4m3fn.
    F8(Vec<f32>),
    /// `[n, ceil(k / 128)]`; codes are 0 to 15.
    I4(Vec<Group>),
}

impl Quantized {
    /// Takes over codes, row-major and one in a byte, and their scales.
    ///
    /// # Panics
    /// When there are not as many as the shape asks for, or a 4-bit code exceeds 15.
    pub fn new(n: usize, k: usize, codes: Vec<u8>, mut scales: Scales) -> Quantized {
        assert!(n.checked_mul(k) == Some(codes.len()), "{} codes for [{n}, {k}]", codes.len());
        let blocks = k.div_ceil(BLOCK);
        match &mut scales {
            Scales::F8(scales) => {
                assert_eq!(scales.len(), n.div_ceil(BLOCK) * blocks, "fp8 scales of [{n}, {k}]");
                for (row, codes) in codes.chunks_exact(k.max(1)).enumerate() {
                    for (block, codes) in codes.chunks(BLOCK).enumerate() {
                        if codes.iter().any(|code| code & 0x7f == 0x7f) {
                            scales[row / BLOCK * blocks + block] = f32::NAN;
                        }
                    }
                }
            }
            Scales::I4(groups) => {
                assert_eq!(groups.len(), n * blocks, "groups of [{n}, {k}]");
                assert!(codes.iter().all(|&code| code < 16), "a 4-bit code above 15");
            }
        }
        Quantized { n, k, codes, scales }
    }

    /// Quantises row-major numbers.
    ///
    /// # Panics
    /// When `dtype` is neither F8 nor I4x2, or there are not as many numbers as the shape asks for.
    pub fn of(values: &[f32], n: usize, k: usize, dtype: DType) -> Quantized {
        assert!(n.checked_mul(k) == Some(values.len()), "{} numbers for [{n}, {k}]", values.len());
        let mut codes = vec![0; values.len()];
        let scales = match dtype {
            DType::F8 => Scales::F8(quantize_f8(values, k, &mut codes)),
            DType::I4x2 => Scales::I4(quantize_i4(values, k, &mut codes)),
            other => panic!("{other:?} quantises no weights alone"),
        };
        Quantized { n, k, codes, scales }
    }

    /// Zeros.
    ///
    /// # Panics
    /// When `dtype` is neither F8 nor I4x2.
    pub fn zeros(n: usize, k: usize, dtype: DType) -> Quantized {
        let blocks = k.div_ceil(BLOCK);
        let scales = match dtype {
            DType::F8 => Scales::F8(vec![0.0; n.div_ceil(BLOCK) * blocks]),
            DType::I4x2 => Scales::I4(vec![Group::from_bits(0); n * blocks]),
            other => panic!("{other:?} quantises no weights alone"),
        };
        Quantized { n, k, codes: vec![0; n * k], scales }
    }

    /// Outputs and inputs.
    pub fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    /// F8 or I4x2.
    pub fn dtype(&self) -> DType {
        match self.scales {
            Scales::F8(_) => DType::F8,
            Scales::I4(_) => DType::I4x2,
        }
    }

    /// Row-major codes, one in a byte.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Scales of all codes.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// The numbers that the codes stand for, row-major.
    pub fn weights(&self) -> Vec<bf16> {
        let blocks = self.k.div_ceil(BLOCK);
        let mut weights = Vec::with_capacity(self.codes.len());
        for (row, codes) in self.codes.chunks_exact(self.k.max(1)).enumerate() {
            for (block, codes) in codes.chunks(BLOCK).enumerate() {
                match &self.scales {
                    Scales::F8(scales) => {
                        let scale = scales[row / BLOCK * blocks + block];
                        weights.extend(codes.iter().map(|&c| bf16::from_f32(E4M3[c as usize] * scale)));
                    }
                    Scales::I4(groups) => {
                        let group = groups[row * blocks + block];
                        weights.extend(codes.iter().map(|&code| group.weight(code)));
                    }
                }
            }
        }
        weights
    }
}

/// Bytes that so many weights of experts take in `dtype`, their scales included.
pub fn bytes_of(weights: u64, dtype: DType) -> u64 {
    let codes = weights.saturating_mul(dtype.bytes() as u64);
    match dtype {
        DType::F8 => codes.saturating_add(weights / (BLOCK * BLOCK) as u64 * size_of::<f32>() as u64),
        DType::I4x2 => (codes / 2).saturating_add(weights / BLOCK as u64 * size_of::<Group>() as u64),
        DType::F32 | DType::Bf16 | DType::I32 | DType::I8 => codes,
    }
}

/// The columns of each block of a row.
fn blocks(k: usize) -> impl Iterator<Item = Range<usize>> {
    (0..k).step_by(BLOCK).map(move |start| start..k.min(start + BLOCK))
}

/// Bits of the greatest magnitude, or of one that is not finite where there is any: without their signs, floats are in order of their bits.
fn greatest_bits(values: &[f32]) -> u32 {
    values.iter().fold(0, |greatest, x| greatest.max(x.abs().to_bits()))
}

fn quantize_f8(values: &[f32], k: usize, codes: &mut [u8]) -> Vec<f32> {
    let mut scales = Vec::new();
    let rows = BLOCK * k.max(1);
    for (values, codes) in values.chunks(rows).zip(codes.chunks_mut(rows)) {
        for columns in blocks(k) {
            let greatest = f32::from_bits(
                values.chunks_exact(k).map(|row| greatest_bits(&row[columns.clone()])).max().unwrap_or(0),
            );
            if !greatest.is_finite() {
                scales.push(f32::NAN);
                continue;
            }
            if greatest < SMALLEST {
                scales.push(0.0);
                continue;
            }
            scales.push(greatest / GREATEST);
            let inverse = GREATEST / greatest;
            for (row, codes) in values.chunks_exact(k).zip(codes.chunks_exact_mut(k)) {
                for (x, code) in row[columns.clone()].iter().zip(&mut codes[columns.clone()]) {
                    *code = e4m3::encode(x * inverse);
                }
            }
        }
    }
    scales
}

fn quantize_i4(values: &[f32], k: usize, codes: &mut [u8]) -> Vec<Group> {
    let mut groups = Vec::new();
    for (row, codes) in values.chunks_exact(k.max(1)).zip(codes.chunks_exact_mut(k.max(1))) {
        for columns in blocks(k) {
            groups.push(Group::quantize(&row[columns.clone()], &mut codes[columns]));
        }
    }
    groups
}

#[cfg(test)]
mod tests;
