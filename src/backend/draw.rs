//! Choosing a token from a row of logits: what the tokens of [`super::Backend::sample`] are. Every backend follows this file, and so
//! does the engine where it changes logits first: the same row and [`Draw`] give the same token everywhere.
//!
//! The best token has the highest logit, the lowest id among equals. Temperature 0 chooses it. Else the weight of a token is
//! [`units`]`(`[`weight`]`)`, a multiple of 2^-39 of the best one's, and
//! 1. top_k keeps so many best tokens;
//! 2. top_p keeps, of these, the fewest best ones whose weights reach its share of their sum ([`reached_by`]);
//! 3. the token is the first, by id, with which the weights of kept tokens add up to more than a part of their sum that the random
//!    number says ([`part`]).
//!
//! Weights are integers, so sums are exact in any order: a row may be divided among threads at will. Rounding changes a token's chance by
//! 2^-40 of the best one's at most.

mod order;
mod weights;

use bytemuck::{Pod, Zeroable};

pub use order::{argmax, fewest, rank, select_best};
pub use weights::{ONE, Weights, units, weight};

/// Most tokens of a row: with as many the sum of all weights fits into 64 bits.
pub const MOST_TOKENS: usize = 1 << 24;

/// How the token of one row is chosen. Kernels take it as it is.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Draw {
    /// Uniform; does not count with temperature 0.
    pub random: u64,
    /// Logits are divided by this; 0 chooses the best token, whatever else is asked.
    pub temperature: f32,
    /// Above 0; from 1 on all tokens are kept.
    pub top_p: f32,
    /// Tokens with less than this share of the best one's weight weigh nothing; at most 1.
    pub min_p: f32,
    /// 0 keeps all.
    pub top_k: u32,
}

impl Draw {
    /// The best token.
    pub const GREEDY: Draw = Draw { random: 0, temperature: 0.0, top_p: 1.0, min_p: 0.0, top_k: 0 };

    /// Whether the best token is chosen.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// How many best tokens are kept of `vocab`, where not all are.
    pub fn kept_of(&self, vocab: usize) -> Option<usize> {
        let kept = self.top_k as usize;
        (0 < kept && kept < vocab).then_some(kept)
    }
}

/// The weights that tokens must reach for top_p, below 1, when all of them weigh `mass`.
pub fn reached_by(top_p: f32, mass: u64) -> u64 {
    ((f64::from(top_p) * mass as f64).ceil() as u64).max(1)
}

/// `floor(random * mass / 2^64)`: uniform below `mass`.
pub fn part(random: u64, mass: u64) -> u64 {
    ((u128::from(random) * u128::from(mass)) >> 64) as u64
}

/// Draws tokens; holds only scratch memory, which is kept, so that a draw allocates nothing once it has its size.
#[derive(Debug, Default)]
pub struct Drawer {
    weights: Weights,
    /// Token ids.
    ids: Vec<u32>,
}

impl Drawer {
    /// Takes memory for rows of `vocab` tokens.
    pub fn reserve(&mut self, vocab: usize) {
        self.weights.reserve(vocab);
        self.ids.clear();
        self.ids.reserve(vocab);
    }

    /// Chooses a token of a row whose [`argmax`] is `best`, a finite logit; others may be negative infinity.
    pub fn draw(&mut self, logits: &[f32], best: u32, draw: &Draw) -> u32 {
        if draw.is_greedy() {
            return best;
        }
        let Drawer { weights, ids } = self;
        weights.weigh(logits, logits[best as usize], draw.temperature, draw.min_p);
        let limited = draw.kept_of(logits.len());
        if limited.is_none() && draw.top_p >= 1.0 {
            let target = part(draw.random, weights.mass());
            return weights.pick(target);
        }
        let mass = match limited {
            Some(kept) => {
                select_best(ids, logits, kept);
                weights.mass_of(ids)
            }
            None => {
                let mass = weights.mass();
                // All tokens with no more weight than this weigh together no more than what top_p may leave out.
                let spared = mass - reached_by(draw.top_p, mass);
                weights.select_above(ids, spared / logits.len() as u64);
                mass
            }
        };
        if draw.top_p < 1.0 {
            let kept = fewest(ids, logits, weights, reached_by(draw.top_p, mass));
            ids.truncate(kept);
        }
        ids.sort_unstable();
        weights.pick_of(ids, part(draw.random, weights.mass_of(ids)))
    }
}

#[cfg(test)]
mod tests;
