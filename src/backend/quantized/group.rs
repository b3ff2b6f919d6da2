//! Scale and zero of 4-bit codes.

use half::bf16;

use super::{SMALLEST, greatest_bits};

/// What the codes of a group stand for: a scale of 11 significant bits, so that those of f16 and bf16 fit, and a zero of 0 to 16, so that
/// those of AWQ and GPTQ do. Kept as it lies in memory: the scale as f32, with the zero in its lowest five bits, which are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Group(u32);

/// Bits of an f32 beyond 11 significant ones.
const BEYOND: u32 = 0x1fff;
/// Bits of an f32 that a bf16 has not.
const BEYOND_BF16: u32 = 0xffff;
/// Bits of the zero.
const ZERO: u32 = 0x1f;
const MOST_ZERO: u32 = 16;
/// What a bf16 leaves of a scale from here on is a bf16 itself.
const SMALLEST_OF_TWO: f32 = 1e-30;

impl Group {
    /// `None` where the scale is not finite or has more bits than fit, or the zero exceeds 16.
    pub fn new(scale: f32, zero: u32) -> Option<Group> {
        let bits = scale.to_bits();
        let fits = bits & BEYOND == 0 && (bits & BEYOND_BF16 == 0 || scale.abs() >= SMALLEST_OF_TWO);
        (scale.is_finite() && fits && zero <= MOST_ZERO).then_some(Group(bits | zero))
    }

    /// As [`Group::bits`] gave it.
    pub fn from_bits(bits: u32) -> Group {
        Group(bits)
    }

    /// As it lies in memory.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// What a difference of one code stands for.
    pub fn scale(self) -> f32 {
        f32::from_bits(self.0 & !ZERO)
    }

    /// The code of 0.
    pub fn zero(self) -> u32 {
        self.0 & ZERO
    }

    /// The number that a code stands for: the product is exact in f32, and rounded once.
    pub fn weight(self, code: u8) -> bf16 {
        bf16::from_f32((f32::from(code) - self.zero() as f32) * self.scale())
    }

    /// Quantises a group: its least and greatest number, or 0, become 0 and 15.
    pub(super) fn quantize(values: &[f32], codes: &mut [u8]) -> Group {
        codes.fill(0);
        if !f32::from_bits(greatest_bits(values)).is_finite() {
            return Group(f32::NAN.to_bits());
        }
        let least = values.iter().fold(0.0f32, |least, &x| least.min(x));
        let greatest = values.iter().fold(0.0f32, |greatest, &x| greatest.max(x));
        let step = greatest / 15.0 - least / 15.0;
        if step < SMALLEST {
            return Group(0);
        }
        let scale = f32::from_bits((step.to_bits() + BEYOND / 2 + 1) & !BEYOND);
        let zero = (-least / scale).round_ties_even().min(15.0);
        for (x, code) in values.iter().zip(codes) {
            *code = ((x / scale).round_ties_even() + zero).clamp(0.0, 15.0) as u8;
        }
        Group(scale.to_bits() | zero as u32)
    }
}
