//! Placements that no policy would make.

#![allow(dead_code, reason = "each test binary uses its own part")]

use router_sim::placement::Placement;

/// A small generator: tests must not depend on a crate's stream of numbers.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n
    }
    pub fn tokens(&mut self, n: usize, vocab: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(vocab) as u32).collect()
    }
}

/// A placement with every expert somewhere, replicas and empty slots anywhere, different in each layer.
pub fn scattered(
    numbers: &mut Numbers,
    ranks: usize,
    experts: usize,
    redundant: usize,
    layers: &[usize],
) -> Placement {
    let per_rank = (experts + redundant).div_ceil(ranks);
    let slots = layers
        .iter()
        .map(|_| {
            let mut map: Vec<i32> = (0..per_rank * ranks)
                .map(|slot| if slot < experts { slot as i32 } else { numbers.below(experts + 1) as i32 - 1 })
                .collect();
            for i in (1..map.len()).rev() {
                map.swap(i, numbers.below(i + 1));
            }
            map
        })
        .collect();
    Placement::new(ranks, per_rank, experts, layers.to_vec(), slots).unwrap()
}
