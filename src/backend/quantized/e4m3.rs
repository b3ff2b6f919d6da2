//! float8_e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinities; 0x7f and 0xff are NaN (Micikevicius et al., "FP8
//! Formats for Deep Learning", arXiv 2209.05433).

/// Numbers of all 256 codes.
pub const E4M3: [f32; 256] = {
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

/// The code nearest to a finite number, ties to even; beyond 448 that of 448.
pub(super) fn encode(x: f32) -> u8 {
    const SMALLEST_NORMAL: f32 = 1.0 / 64.0;
    // Adding it rounds to multiples of the smallest subnormal.
    const ROUNDS: f32 = 16384.0;
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let magnitude = x.abs().min(super::GREATEST);
    let code = if magnitude < SMALLEST_NORMAL {
        (magnitude + ROUNDS).to_bits() - ROUNDS.to_bits()
    } else {
        let bits = magnitude.to_bits();
        ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)
    };
    sign | code as u8
}
