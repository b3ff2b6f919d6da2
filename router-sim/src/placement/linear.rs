//! The placement a run starts from: experts in order, blind to load.

use super::{ClusterShape, EMPTY, Placement, PlacementPolicy};
use crate::Result;
use crate::load::LoadWindow;

/// Experts in order of their ids, then copies of experts 0, 1, ... for the redundant slots: the sequence `i mod
/// experts` for i in `0..experts + redundant`, cut into one contiguous run per rank.
///
/// Where the slots do not divide, run lengths differ by at most one, longer runs first, and each shorter run is
/// padded by one empty slot at its end: idle slots are spread, never a whole idle rank while another is full. A run
/// has at most as many slots as there are experts, so no rank holds an expert twice; redundant slots beyond one copy
/// of each expert on each rank stay empty. Where everything divides this is the initial map of vLLM and SGLang.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Linear;

impl PlacementPolicy for Linear {
    /// Uses the window's shape only, not its counts.
    fn place(&self, load: &LoadWindow, cluster: &ClusterShape) -> Result<Placement> {
        let experts = load.experts();
        let slots_per_rank = cluster.slots_per_rank(experts)?;
        let filled = experts.saturating_mul(cluster.ranks).min(experts + cluster.redundant);
        let (shorter, longer_runs) = (filled / cluster.ranks, filled % cluster.ranks);
        let mut map = Vec::with_capacity(slots_per_rank * cluster.ranks);
        let mut next = 0;
        for rank in 0..cluster.ranks {
            let run = shorter + usize::from(rank < longer_runs);
            map.extend((next..next + run).map(|i| (i % experts) as i32));
            map.resize((rank + 1) * slots_per_rank, EMPTY);
            next += run;
        }
        let layers = vec![map; load.layers()];
        Placement::new(cluster.ranks, slots_per_rank, experts, load.layer_ids().to_vec(), layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn linear(experts: usize, ranks: usize, redundant: usize) -> Placement {
        Linear.place(&LoadWindow::new(&[0, 2], experts), &ClusterShape { ranks, redundant }).unwrap()
    }

    #[test]
    fn known_maps() {
        let map = |e, r, x| linear(e, r, x).layer(1).slots().to_vec();
        assert_eq!(map(4, 2, 0), [0, 1, 2, 3]);
        assert_eq!(map(5, 4, 0), [0, 1, 2, -1, 3, -1, 4, -1]);
        assert_eq!(map(4, 2, 2), [0, 1, 2, 3, 0, 1]);
        assert_eq!(map(2, 4, 0), [0, 1, -1, -1]);
        assert_eq!(map(3, 2, 2), [0, 1, 2, 0, 1, -1]);
        assert_eq!(map(2, 1, 3), [0, 1, -1, -1, -1]);
    }

    proptest! {
        #[test]
        fn spread_and_without_duplicates(experts in 1usize..40, ranks in 1usize..12, extra in 0usize..100) {
            let placement = linear(experts, ranks, extra);
            let layer = placement.layer(0);
            let copies: Vec<usize> = (0..experts).map(|e| layer.replicas(e).len()).collect();
            prop_assert_eq!(copies.iter().sum::<usize>(), (experts + extra).min(experts * ranks));
            prop_assert!(copies.iter().max().unwrap() - copies.iter().min().unwrap() <= 1);
            let mut held = Vec::new();
            for rank in 0..ranks {
                let mut ids: Vec<i32> = layer.slots_of_rank(rank).iter().copied().filter(|e| *e != EMPTY).collect();
                held.push(ids.len());
                ids.sort_unstable();
                prop_assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "rank {} holds {:?}", rank, ids);
            }
            prop_assert!(held.iter().max().unwrap() - held.iter().min().unwrap() <= 1);
        }
    }
}
