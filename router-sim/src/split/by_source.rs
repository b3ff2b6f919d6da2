//! Splits in which each source rank decides for its own tokens, whatever the others send.

use super::plan::{fill_single_copies, sources_per_rank};
use crate::placement::LayerPlacement;

/// Draws a replica for every token. Fills `quotas` `[sources][slots]`, all zero before.
pub(super) fn random(seed: u64, layer: LayerPlacement<'_>, counts: &[u32], quotas: &mut [u32]) {
    let (experts, slots) = (layer.experts(), layer.slots().len());
    let mut generator = SplitMix(seed);
    for (counts, quotas) in counts.chunks(experts).zip(quotas.chunks_mut(slots)) {
        fill_single_copies(layer, counts, quotas);
        for (expert, &tokens) in counts.iter().enumerate() {
            // The counts enter, so that steps draw differently.
            generator.0 ^= u64::from(tokens).wrapping_mul(0xd6e8_feb8_6659_fd93);
            let replicas = layer.replicas(expert);
            if replicas.len() == 1 {
                continue;
            }
            for _ in 0..tokens {
                quotas[replicas[generator.below(replicas.len())] as usize] += 1;
            }
        }
    }
}

/// Sends each source's tokens of an expert to one of its nearest replicas. Fills `quotas` `[sources][slots]`, all zero
/// before.
pub(super) fn nearest(ranks_per_node: usize, layer: LayerPlacement<'_>, counts: &[u32], quotas: &mut [u32]) {
    let (experts, slots) = (layer.experts(), layer.slots().len());
    let per_rank = sources_per_rank(layer, counts);
    for (source, (counts, quotas)) in counts.chunks(experts).zip(quotas.chunks_mut(slots)).enumerate() {
        let home = source.checked_div(per_rank);
        let node = home.and_then(|rank| rank.checked_div(ranks_per_node));
        fill_single_copies(layer, counts, quotas);
        for (expert, &tokens) in counts.iter().enumerate() {
            let replicas = layer.replicas(expert);
            if tokens == 0 || replicas.len() == 1 {
                continue;
            }
            let rank_of = |slot: &u32| layer.rank_of(*slot as usize);
            let on_rank = run(replicas, |slot| home == Some(rank_of(slot)));
            let on_node =
                run(replicas, |slot| node.is_some() && node == rank_of(slot).checked_div(ranks_per_node));
            let near = [on_rank, on_node, replicas].into_iter().find(|near| !near.is_empty());
            let near = near.expect("an expert has a slot");
            quotas[near[source % near.len()] as usize] += tokens;
        }
    }
}

/// The slots that match: neighbours, because slots ascend and ranks and nodes are runs of slots.
fn run(slots: &[u32], matches: impl Fn(&u32) -> bool) -> &[u32] {
    let start = slots.iter().position(&matches).unwrap_or(slots.len());
    let len = slots[start..].iter().take_while(|slot| matches(slot)).count();
    &slots[start..start + len]
}

/// SplitMix64 (Steele, Lea, Flood, 2014).
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform below `n`.
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}
