//! Reproducible random numbers: fast, and normal enough for weights.

/// SplitMix64 (Steele, Lea and Flood, 2014).
pub struct Noise(u64);

impl Noise {
    /// A generator of its own for every tensor, so that no tensor depends on those before it.
    pub fn new(seed: u64, tensor: usize) -> Noise {
        Noise(seed ^ (tensor as u64).wrapping_mul(0xd134_2543_de82_ef95))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Mean 0, variance 1: the sum of four uniform numbers, whose variance is 4/12.
    pub fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: u64 = (0..4).map(|part| (bits >> (16 * part)) & 0xffff).sum();
        (sum as f32 / 65_536.0 - 2.0) * 3f32.sqrt()
    }
}
