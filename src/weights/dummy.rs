//! Values that stand in for a checkpoint's, for measuring speed and memory without one: seeded by the tensor's name, of about the
//! size that keeps products near 1, and made as fast as memory is written.

use std::ops::Range;
use std::sync::LazyLock;

use half::bf16;

/// Elements of the pool that all matrices are cut from.
const POOL: usize = 1 << 22;
/// Rows start at multiples of so many elements.
const STEP: usize = 64;
/// Bits of a bf16 below its exponent.
const MANTISSA: u32 = 7;

/// Random signs and mantissas between 1/2 and 2, so that every halving is a subtraction from the exponent.
static POOLED: LazyLock<Vec<u16>> = LazyLock::new(|| {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let element = |_| {
        state = mix(state);
        let bits = (state >> 48) as u16;
        let exponent = if bits & 0x100 == 0 { 126 } else { 127 };
        bits & 0x8000 | exponent << MANTISSA | bits & 0x7f
    };
    (0..POOL).map(element).collect()
});

/// A matrix `[_, k]` of made-up values.
#[derive(Debug, Clone, Copy)]
pub struct Dummy {
    seed: u64,
    /// Powers of two by which the pool's values are made smaller.
    halvings: u16,
}

impl Dummy {
    /// The matrix of this name with `k` inputs.
    pub fn new(name: &str, k: usize) -> Dummy {
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Dummy { seed, halvings: (k.max(1).ilog2() / 2) as u16 }
    }

    /// Writes a block, row-major.
    pub fn block_bf16(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [bf16]) {
        let width = cols.len();
        if width == 0 {
            return;
        }
        let pool = POOLED.as_slice();
        for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
            let mut at = (mix(self.seed ^ row as u64) as usize % (POOL / STEP) * STEP + cols.start) % POOL;
            let mut out: &mut [u16] = bytemuck::cast_slice_mut(out);
            while !out.is_empty() {
                let (now, rest) = out.split_at_mut(out.len().min(POOL - at));
                let less = self.halvings << MANTISSA;
                now.iter_mut().zip(&pool[at..]).for_each(|(out, bits)| *out = bits - less);
                (out, at) = (rest, 0);
            }
        }
    }

    /// The same values as f32.
    pub fn block(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let mut narrow = vec![bf16::ZERO; cols.len()];
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len().max(1))) {
            self.block_bf16(row..row + 1, cols.clone(), &mut narrow);
            out.iter_mut().zip(&narrow).for_each(|(out, value)| *out = value.to_f32());
        }
    }
}

/// What an element of the vector of this name is: norms keep what they norm, biases and sinks add nothing.
pub fn vector_value(name: &str) -> f32 {
    if name.ends_with(".weight") { 1.0 } else { 0.0 }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_parts_of_one_matrix_of_unit_products() {
        let (n, k) = (40, 1024);
        let matrix = Dummy::new("layers.0.q_proj", k);
        let mut whole = vec![bf16::ZERO; n * k];
        matrix.block_bf16(0..n, 0..k, &mut whole);
        let mut part = vec![bf16::ZERO; 3 * 100];
        matrix.block_bf16(7..10, 500..600, &mut part);
        for (row, part) in (7..10).zip(part.chunks(100)) {
            assert_eq!(part, &whole[row * k + 500..row * k + 600]);
        }
        let mut wide = vec![0.0; n * k];
        matrix.block(0..n, 0..k, &mut wide);
        assert!(wide.iter().zip(&whole).all(|(w, n)| w.to_bits() == n.to_f32().to_bits()));
        // A row of ones times a row of the matrix has a variance near 1.
        let sums: Vec<f32> = wide.chunks(k).map(|row| row.iter().sum()).collect();
        let variance = sums.iter().map(|x| x * x).sum::<f32>() / n as f32;
        assert!((0.2..5.0).contains(&variance), "{variance}");
        let mut other = vec![bf16::ZERO; n * k];
        Dummy::new("layers.1.q_proj", k).block_bf16(0..n, 0..k, &mut other);
        assert_ne!(whole, other);
    }

    #[test]
    fn rows_longer_than_the_pool_go_round() {
        let k = POOL + 300;
        let mut row = vec![bf16::ZERO; k];
        Dummy::new("long", k).block_bf16(0..1, 0..k, &mut row);
        assert_eq!(row[..300], row[POOL..]);
        assert!(row.iter().all(|x| x.to_f32() != 0.0));
    }
}
