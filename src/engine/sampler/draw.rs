//! Weights of tokens, and draws from them, with the same bits on every machine.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Sums over the vocabulary go by blocks of this many tokens.
const BLOCK: usize = 512;
/// A block is summed in this many independent chains, which the processor overlaps.
const LANES: usize = 8;

/// exp((logit - max) / temperature) of every token: the best has weight 1.
#[derive(Debug, Default)]
pub(super) struct Weights(Vec<f32>);

impl Weights {
    /// Fills the weights of all tokens.
    pub fn weigh(&mut self, logits: &[f32], max: f32, temperature: f32) {
        self.0.clear();
        self.0.extend(logits.iter().map(|&logit| exp_nonpositive((logit - max) / temperature)));
    }

    /// Tokens with less than this share of the best one's weight weigh nothing.
    pub fn drop_below(&mut self, share: f32) {
        if share > 0.0 {
            for weight in &mut self.0 {
                *weight = if *weight >= share { *weight } else { 0.0 };
            }
        }
    }

    /// The weight of one token.
    pub fn of(&self, id: u32) -> f64 {
        f64::from(self.0[id as usize])
    }

    /// Sum of all weights.
    pub fn mass(&self) -> f64 {
        self.0.chunks(BLOCK).map(block_mass).sum()
    }

    /// Sum of the weights of these tokens, in the order they have.
    pub fn mass_of(&self, ids: &[u32]) -> f64 {
        ids.iter().map(|&id| self.of(id)).sum()
    }

    /// Selects the tokens of at least this weight, in id order.
    pub fn select_above(&self, ids: &mut Vec<u32>, weight: f64) {
        ids.clear();
        // Once: how many there are differs from row to row.
        ids.reserve(self.0.len());
        ids.extend((0u32..).zip(&self.0).filter(|&(_, &w)| f64::from(w) >= weight).map(|(id, _)| id));
    }

    /// Draws from all tokens, with `u` in [0, 1): whole blocks are passed over by their sums.
    pub fn pick(&self, u: f64) -> u32 {
        let mut left = u * self.mass();
        let mut from = None;
        for (block, weights) in self.0.chunks(BLOCK).enumerate() {
            let mass = block_mass(weights);
            if mass > 0.0 {
                from = Some((block * BLOCK, left));
            }
            if mass > left {
                break;
            }
            left -= mass;
        }
        // Rounding can put the target behind the last block; then it is the last token with a weight.
        let (start, left) = from.expect("the best token has weight 1");
        pick(start as u32..self.0.len().min(start + BLOCK) as u32, self, left)
    }
}

fn block_mass(weights: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let mut chunks = weights.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &weight) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(weight);
        }
    }
    lanes.iter().sum::<f64>() + chunks.remainder().iter().copied().map(f64::from).sum::<f64>()
}

/// The first token whose running sum of weights exceeds `target`. One of them has a weight.
pub(super) fn pick(ids: impl Iterator<Item = u32>, weights: &Weights, target: f64) -> u32 {
    let mut sum = 0.0;
    let mut last = None;
    for id in ids {
        let weight = weights.of(id);
        sum += weight;
        if sum > target {
            return id;
        }
        if weight > 0.0 {
            last = Some(id);
        }
    }
    // Rounding can make the target equal the whole sum.
    last.expect("a token with a weight is among them")
}

/// exp(x) for x <= 0, to about 2 ulp; 0 where the result would be denormal. Plain multiplications and additions in a
/// fixed order, so the same bits everywhere, and free of branches, so that a loop over it becomes vector code.
/// Argument reduction and polynomial are those of Cephes' `expf` (Moshier).
#[inline]
pub(super) fn exp_nonpositive(x: f32) -> f32 {
    const LOWEST: f32 = -87.0;
    /// 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > LOWEST { x } else { LOWEST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    let fraction = p * r * r + r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x > LOWEST { fraction * power } else { 0.0 }
}

/// A number in [0, 1) that depends on seed and position only: 53 bits of ChaCha8 keyed by both.
pub(super) fn uniform(seed: u64, position: u32) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..12].copy_from_slice(&position.to_le_bytes());
    (ChaCha8Rng::from_seed(key).next_u64() >> 11) as f64 / (1u64 << 53) as f64
}
