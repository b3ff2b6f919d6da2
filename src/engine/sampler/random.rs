//! The random numbers of draws, which keep no state.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A number that depends on seed and position only: the first 64 bits of ChaCha8 keyed by both.
pub(super) fn random(seed: u64, position: u32) -> u64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..12].copy_from_slice(&position.to_le_bytes());
    ChaCha8Rng::from_seed(key).next_u64()
}
