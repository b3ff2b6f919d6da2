//! Placements that no policy would make, and choices that no router would.

#![allow(dead_code, reason = "each test binary uses its own part")]

use router_sim::placement::Placement;

use super::numbers::Numbers;

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

/// `[rank][row][top_k]`: different experts in each of the `counts[rank]` rows of a rank, those of low numbers more often. Rows that
/// pad them to `rows` chose no expert at all.
pub fn choices(numbers: &mut Numbers, counts: &[u32], rows: usize, experts: usize, top_k: usize) -> Vec<i32> {
    let mut ids = vec![i32::MIN; counts.len() * rows * top_k];
    for (at, row) in ids.chunks_mut(top_k).enumerate() {
        if at % rows < counts[at / rows] as usize {
            let mut left: Vec<i32> = (0..experts as i32).collect();
            for id in row {
                let below = 1 + numbers.below(left.len());
                *id = left.remove(numbers.below(below));
            }
        }
    }
    ids
}
