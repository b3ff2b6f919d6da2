//! Numbers that are the same in every run.

#![allow(dead_code, reason = "each test binary uses its own part")]

/// A small generator: tests must not depend on a crate's stream of numbers.
pub struct Numbers(pub u64);

impl Numbers {
    /// Seeds beside each other give streams that have nothing in common.
    pub fn new(seed: u64) -> Self {
        Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// 64 bits, the upper ones better than the lower.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0
    }

    /// Uniform in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 33) as usize) % n
    }

    /// Uniform over all numbers of 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.next() & !0 << 32 | self.next() >> 32
    }

    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Standard normal, nearly: the sum of twelve uniform numbers.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit() * 0.5).sum()
    }

    /// `n` numbers, uniform in [-1, 1).
    pub fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }

    /// `n` tokens of a vocabulary.
    pub fn tokens(&mut self, n: usize, vocab: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(vocab) as u32).collect()
    }
}
