//! Lower bounds on the largest rank load of a layer: what no placement, or no split, can beat.
//!
//! All are in tokens, for divisible tokens. What a given placement allows is [`crate::split::Shares::optimum`].

use crate::{Error, Result};

/// Most groups of experts whose partitions are searched.
const MAX_GROUPS: usize = 16;
/// Ranks with more tokens than this have Gaussian noise, near enough.
const MANY_TOKENS: f64 = 1000.0;

/// Every rank gets the same: tokens over ranks.
pub fn mean_load(tokens: &[u64], ranks: usize) -> f64 {
    tokens.iter().map(|n| *n as f64).sum::<f64>() / ranks as f64
}

/// No placement of `slots` slots on `ranks` ranks has a smaller largest load under any split: the larger of the mean
/// and the smallest T such that experts with at most T tokens per copy, one copy per rank at most, fit into the slots.
/// Without redundant slots, where all copies are whole experts, the pigeonhole bound as well.
///
/// # Panics
/// Without ranks, or with fewer slots than experts.
pub fn replica_bound(tokens: &[u64], ranks: usize, slots: usize) -> f64 {
    replica_bound_of(&as_floats(tokens), ranks, slots)
}

/// [`replica_bound`] for loads in any unit.
pub(crate) fn replica_bound_of(loads: &[f64], ranks: usize, slots: usize) -> f64 {
    let copies = fewest_per_copy(loads, ranks, slots);
    let largest = loads.iter().zip(&copies).map(|(n, c)| *n / f64::from(*c)).fold(0.0, f64::max);
    let bound = (loads.iter().sum::<f64>() / ranks as f64).max(largest);
    match slots == loads.len() && slots.is_multiple_of(ranks) {
        true => bound.max(pigeonhole(loads, ranks)),
        false => bound,
    }
}

fn as_floats(tokens: &[u64]) -> Vec<f64> {
    tokens.iter().map(|n| *n as f64).collect()
}

/// Copies per expert that make the largest number of tokens per copy as small as the slots allow; `[experts]`. Greedy,
/// one copy after the other to the expert with most tokens per copy, is optimal for that; an expert on all ranks gets no more.
///
/// # Panics
/// Without ranks, or with fewer slots than experts.
pub fn fewest_tokens_per_copy(tokens: &[u64], ranks: usize, slots: usize) -> Vec<u32> {
    fewest_per_copy(&as_floats(tokens), ranks, slots)
}

/// [`fewest_tokens_per_copy`] for loads in any unit.
pub(crate) fn fewest_per_copy(loads: &[f64], ranks: usize, slots: usize) -> Vec<u32> {
    assert!(ranks > 0 && slots >= loads.len(), "{slots} slots on {ranks} ranks for {} experts", loads.len());
    let mut copies = vec![1u32; loads.len()];
    if ranks == 1 {
        return copies;
    }
    // Loads are not negative, so their bits are in order.
    let key = |e: usize, c: u32| ((loads[e] / f64::from(c)).to_bits(), std::cmp::Reverse(e));
    let mut queue: std::collections::BinaryHeap<_> = (0..loads.len()).map(|e| key(e, 1)).collect();
    for _ in loads.len()..slots {
        let Some((_, std::cmp::Reverse(e))) = queue.pop() else { break };
        copies[e] += 1;
        if (copies[e] as usize) < ranks {
            queue.push(key(e, copies[e]));
        }
    }
    copies
}

/// With whole experts and equally many on each rank: of the k x ranks + 1 largest experts, some rank holds k + 1, and
/// the rest of its slots hold at least the smallest.
fn pigeonhole(loads: &[f64], ranks: usize) -> f64 {
    let slots_per_rank = loads.len() / ranks;
    let mut largest = loads.to_vec();
    largest.sort_unstable_by(|a, b| b.total_cmp(a));
    let sum = |loads: &[f64]| loads.iter().sum::<f64>();
    let with = |k: usize| {
        let end = k * ranks + 1;
        sum(&largest[end - (k + 1)..end]) + sum(&largest[loads.len() - (slots_per_rank - k - 1)..])
    };
    (0..slots_per_rank).map(with).fold(0.0, f64::max)
}

/// Where groups of consecutive experts stay whole on a node, equally many on each: the best partition of all, found by
/// search; the fullest node's tokens over its ranks.
///
/// # Errors
/// [`Error::Impossible`] when something does not divide, or there are more than 16 groups.
pub fn group_on_node_bound(tokens: &[u64], ranks: usize, groups: usize, nodes: usize) -> Result<f64> {
    if groups == 0 || nodes == 0 || !tokens.len().is_multiple_of(groups) || !groups.is_multiple_of(nodes) {
        return Err(Error::Impossible(format!(
            "{} experts in {groups} groups do not divide among {nodes} nodes",
            tokens.len()
        )));
    }
    if !ranks.is_multiple_of(nodes) || ranks == 0 {
        return Err(Error::Impossible(format!("{ranks} ranks do not divide among {nodes} nodes")));
    }
    if groups > MAX_GROUPS {
        return Err(Error::Impossible(format!(
            "{groups} groups exceed the limit of {MAX_GROUPS} for this bound"
        )));
    }
    let sums: Vec<f64> =
        tokens.chunks(tokens.len() / groups).map(|g| g.iter().map(|n| *n as f64).sum()).collect();
    let node_of = partition_groups(&sums, nodes);
    let held =
        |node: usize| sums.iter().zip(&node_of).filter(|(_, n)| **n == node).map(|(sum, _)| sum).sum::<f64>();
    Ok((0..nodes).map(held).fold(0.0, f64::max) / (ranks / nodes) as f64)
}

/// The node of each group, equally many groups on each, such that the fullest node holds as little as can be. With more
/// groups than are searched, the largest go first, each to the emptiest node.
pub(crate) fn partition_groups(sums: &[f64], nodes: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sums.len()).collect();
    order.sort_unstable_by(|a, b| sums[*b].total_cmp(&sums[*a]).then(a.cmp(b)));
    let mut search = Partition {
        sums: order.iter().map(|g| sums[*g]).collect(),
        room: vec![sums.len() / nodes; nodes],
        held: vec![0.0; nodes],
        node_of: vec![0; sums.len()],
        best: (f64::INFINITY, Vec::new()),
        greedy: sums.len() > MAX_GROUPS,
    };
    search.place(0);
    let mut node_of = vec![0; sums.len()];
    order.iter().zip(&search.best.1).for_each(|(group, node)| node_of[*group] = *node);
    node_of
}

/// Branch and bound over the nodes of each group, the largest first.
struct Partition {
    sums: Vec<f64>,
    room: Vec<usize>,
    held: Vec<f64>,
    node_of: Vec<usize>,
    best: (f64, Vec<usize>),
    /// Take the first complete partition.
    greedy: bool,
}

impl Partition {
    fn place(&mut self, group: usize) {
        if group == self.sums.len() {
            self.best = (self.held.iter().copied().fold(0.0, f64::max), self.node_of.clone());
            return;
        }
        // The emptiest node first, so that the first partition is a good one.
        let mut nodes: Vec<usize> = (0..self.room.len()).filter(|node| self.room[*node] > 0).collect();
        nodes.sort_by(|a, b| self.held[*a].total_cmp(&self.held[*b]));
        // Of nodes that look alike, the first stands for all.
        nodes.dedup_by(|a, b| self.held[*a] == self.held[*b] && self.room[*a] == self.room[*b]);
        for node in nodes {
            let held = self.held[node] + self.sums[group];
            if held >= self.best.0 || (self.greedy && self.best.0.is_finite()) {
                break;
            }
            let before = std::mem::replace(&mut self.held[node], held);
            self.room[node] -= 1;
            self.node_of[group] = node;
            self.place(group + 1);
            self.room[node] += 1;
            self.held[node] = before;
        }
    }
}

/// The imbalance ratio (max / mean - 1) that chance alone leaves when `assignments` (tokens x experts per token) of one
/// layer fall on `ranks` ranks with equal probability, as under the best placement: the expected maximum of as many
/// Poisson variables. Independent choices, and a split that does not know the batch; the exact split can do better.
pub fn sampling_floor(assignments: u64, ranks: usize) -> f64 {
    let mean = assignments as f64 / ranks as f64;
    match mean {
        _ if assignments == 0 || ranks < 2 => 0.0,
        // The excess grows as the root of the mean.
        m if m > MANY_TOKENS => expected_maximum_excess(MANY_TOKENS, ranks) / (MANY_TOKENS * m).sqrt(),
        m => expected_maximum_excess(m, ranks) / m,
    }
}

/// E[max of `count` Poisson variables of this mean] - mean, from the sum over n of P(max > n).
fn expected_maximum_excess(mean: f64, count: usize) -> f64 {
    let (mut log_factorial, mut below, mut expected) = (0.0, 0.0, 0.0);
    let mut n = 0.0;
    loop {
        if n > 0.0 {
            log_factorial += f64::ln(n);
        }
        below += (n * mean.ln() - mean - log_factorial).exp();
        let above = 1.0 - f64::min(below, 1.0).powf(count as f64);
        expected += above;
        // Far beyond what as many variables as there are ranks ever reach.
        if n > mean + 12.0 * mean.sqrt() + 30.0 {
            return (expected - mean).max(0.0);
        }
        n += 1.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_bounds() {
        assert_eq!(mean_load(&[1, 2, 3], 2), 3.0);
        // 12 on two of three ranks, or one token more per copy elsewhere.
        assert_eq!(replica_bound(&[12, 1, 1], 3, 4), 6.0);
        assert_eq!(replica_bound(&[12, 1, 1], 2, 100), 7.0, "at most a copy on each rank");
        assert_eq!(fewest_tokens_per_copy(&[12, 1, 1], 3, 6), [3, 2, 1]);
        // Of the three largest of four, some rank holds two.
        assert_eq!(replica_bound(&[5, 5, 5, 0], 2, 4), 10.0);
        assert_eq!(replica_bound(&[9, 1, 1, 1], 2, 4), 10.0);
        assert_eq!(replica_bound(&[0, 0], 2, 2), 0.0);
        assert!(replica_bound(&[u64::MAX, u64::MAX], 2, 4) > 1e19);
    }

    #[test]
    fn groups_on_nodes() {
        // Group sums 5, 4, 3, 2: the best halves are 5 + 2 and 4 + 3.
        assert_eq!(group_on_node_bound(&[5, 0, 4, 0, 3, 0, 1, 1], 4, 4, 2).unwrap(), 3.5);
        assert_eq!(group_on_node_bound(&[5, 4, 3, 2], 4, 4, 4).unwrap(), 5.0);
        assert_eq!(group_on_node_bound(&[0; 4], 2, 2, 2).unwrap(), 0.0);
        for (ranks, groups, nodes, expected) in [
            (4, 3, 1, "8 experts in 3 groups"),
            (4, 4, 3, "in 4 groups do not divide among 3 nodes"),
            (3, 4, 2, "3 ranks do not divide among 2 nodes"),
            (4, 0, 1, "in 0 groups"),
        ] {
            let error = group_on_node_bound(&[1; 8], ranks, groups, nodes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} should contain {expected:?}");
        }
        let error = group_on_node_bound(&[1; 32], 2, 32, 2).unwrap_err().to_string();
        assert!(error.contains("32 groups exceed the limit of 16"), "{error}");
    }

    /// Against two million Poisson-like draws of a multinomial: 64 tokens x 8 on 32 ranks, and fewer.
    #[test]
    fn sampling_floor_against_draws() {
        assert_eq!(sampling_floor(0, 4), 0.0);
        assert_eq!(sampling_floor(100, 1), 0.0);
        let mut state = 1u64;
        for (assignments, ranks) in [(512, 32), (64, 8), (16_384, 32), (100_000, 4)] {
            let rounds = 2_000_000 / assignments;
            let mut excess = 0.0;
            for _ in 0..rounds {
                let mut loads = vec![0u64; ranks];
                for _ in 0..assignments {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                    loads[(state >> 33) as usize % ranks] += 1;
                }
                excess += *loads.iter().max().unwrap() as f64 / (assignments as f64 / ranks as f64) - 1.0;
            }
            let (drawn, floor) = (excess / rounds as f64, sampling_floor(assignments as u64, ranks));
            let tolerance = if rounds > 1000 { 0.05 } else { 0.2 };
            assert!(
                (floor / drawn - 1.0).abs() < tolerance,
                "{assignments} on {ranks}: {floor} against {drawn}"
            );
        }
        let (below, above) = (sampling_floor(31_999, 32), sampling_floor(32_001, 32));
        assert!((below / above - 1.0).abs() < 1e-3, "{below} and {above} at the joint");
    }

    /// Every way to put whole experts, equally many, on ranks: the smallest largest load.
    fn best_whole(tokens: &[u64], room: &mut [usize], loads: &mut [u64]) -> u64 {
        let Some((first, rest)) = tokens.split_first() else { return *loads.iter().max().unwrap() };
        let mut best = u64::MAX;
        for rank in 0..room.len() {
            if room[rank] > 0 {
                room[rank] -= 1;
                loads[rank] += first;
                best = best.min(best_whole(rest, room, loads));
                loads[rank] -= first;
                room[rank] += 1;
            }
        }
        best
    }

    proptest! {
        #[test]
        fn whole_experts_never_beat_the_bound(ranks in 1usize..4, per_rank in 1usize..3, seed in prop::collection::vec(0u64..50, 6)) {
            let tokens = &seed[..ranks * per_rank];
            let best = best_whole(tokens, &mut vec![per_rank; ranks], &mut vec![0; ranks]);
            prop_assert!(replica_bound(tokens, ranks, tokens.len()) <= best as f64);
            // Groups of one expert, a rank per node: the search is exact.
            prop_assert_eq!(group_on_node_bound(tokens, ranks, tokens.len(), ranks).unwrap(), best as f64);
        }

        #[test]
        fn copies_are_the_fewest_tokens_per_copy(tokens in prop::collection::vec(0u64..60, 1..4), ranks in 1usize..4, extra in 0usize..5) {
            let slots = tokens.len() + extra;
            let largest = |copies: &[u32]| tokens.iter().zip(copies).map(|(n, c)| *n as f64 / f64::from(*c)).fold(0.0, f64::max);
            let own = fewest_tokens_per_copy(&tokens, ranks, slots);
            prop_assert!(own.iter().all(|c| *c as usize <= ranks.max(1)) && own.iter().sum::<u32>() as usize <= slots);
            let choices = (ranks as u32).pow(tokens.len() as u32);
            let decode = |mut code: u32| tokens.iter().map(|_| { let c = code % ranks as u32 + 1; code /= ranks as u32; c }).collect::<Vec<_>>();
            let all = (0..choices).map(decode).filter(|c| c.iter().sum::<u32>() as usize <= slots);
            let best = all.map(|c| largest(&c)).fold(f64::MAX, f64::min);
            prop_assert_eq!(largest(&own), best);
        }
    }
}
