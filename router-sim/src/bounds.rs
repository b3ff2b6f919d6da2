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
    let copies = fewest_tokens_per_copy(tokens, ranks, slots);
    let largest = tokens.iter().zip(&copies).map(|(n, c)| *n as f64 / *c as f64).fold(0.0, f64::max);
    let bound = mean_load(tokens, ranks).max(largest);
    match slots == tokens.len() && slots.is_multiple_of(ranks) {
        true => bound.max(pigeonhole(tokens, ranks)),
        false => bound,
    }
}

/// Copies per expert that make the largest number of tokens per copy as small as the slots allow; `[experts]`. Greedy,
/// one copy after the other to the expert with most tokens per copy, is optimal for that; an expert on all ranks gets no more.
///
/// # Panics
/// Without ranks, or with fewer slots than experts.
pub fn fewest_tokens_per_copy(tokens: &[u64], ranks: usize, slots: usize) -> Vec<u32> {
    assert!(
        ranks > 0 && slots >= tokens.len(),
        "{slots} slots on {ranks} ranks for {} experts",
        tokens.len()
    );
    let mut copies = vec![1u32; tokens.len()];
    if ranks == 1 {
        return copies;
    }
    let key = |e: usize, c: u32| ((tokens[e] as f64 / f64::from(c)).to_bits(), std::cmp::Reverse(e));
    let mut queue: std::collections::BinaryHeap<_> = (0..tokens.len()).map(|e| key(e, 1)).collect();
    for _ in tokens.len()..slots {
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
fn pigeonhole(tokens: &[u64], ranks: usize) -> f64 {
    let slots_per_rank = tokens.len() / ranks;
    let mut largest = tokens.to_vec();
    largest.sort_unstable_by(|a, b| b.cmp(a));
    let sum = |tokens: &[u64]| tokens.iter().map(|n| *n as f64).sum::<f64>();
    let with = |k: usize| {
        let end = k * ranks + 1;
        sum(&largest[end - (k + 1)..end]) + sum(&largest[tokens.len() - (slots_per_rank - k - 1)..])
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
    let mut sums: Vec<f64> =
        tokens.chunks(tokens.len() / groups).map(|g| g.iter().map(|n| *n as f64).sum()).collect();
    sums.sort_unstable_by(|a, b| b.total_cmp(a));
    let mut search =
        Partition { sums, room: vec![groups / nodes; nodes], held: vec![0.0; nodes], best: f64::MAX };
    search.place(0);
    Ok(search.best / (ranks / nodes) as f64)
}

/// Branch and bound over the nodes of each group, the largest first.
struct Partition {
    sums: Vec<f64>,
    room: Vec<usize>,
    held: Vec<f64>,
    best: f64,
}

impl Partition {
    fn place(&mut self, group: usize) {
        if group == self.sums.len() {
            self.best = self.held.iter().copied().fold(0.0, f64::max);
            return;
        }
        for node in 0..self.room.len() {
            // Of nodes that look alike, the first stands for all.
            let like = |n: usize| self.held[n] == self.held[node] && self.room[n] == self.room[node];
            let held = self.held[node] + self.sums[group];
            if self.room[node] == 0 || held >= self.best || (0..node).any(like) {
                continue;
            }
            let before = std::mem::replace(&mut self.held[node], held);
            self.room[node] -= 1;
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
        if n > mean && above < 1e-12 {
            return (expected - mean).max(0.0);
        }
        n += 1.0;
    }
}
