//! New labels for a planned layer: ranks renamed and slots ordered so that as much as possible stays where it is.

use super::layout::NONE;
use crate::placement::LayerPlacement;

/// Above this many ranks, matching is greedy.
const MAX_MATCHED_RANKS: usize = 256;

/// Renames the ranks of a plan, within each of `nodes` nodes, for the fewest transfers from the current placement; what
/// stays on a rank keeps its slot. Slots `[ranks * slots_per_rank]`, as planned and as returned.
pub fn align(planned: &[u32], current: LayerPlacement<'_>, nodes: usize) -> Vec<u32> {
    let width = current.slots_per_rank();
    let per_node = current.ranks() / nodes;
    let mut aligned = vec![NONE; planned.len()];
    for node in 0..nodes {
        let start = node * per_node;
        // A second copy on a rank is no transfer, wherever it comes from.
        let arrivals = |new: usize, old: usize| {
            let held = current.slots_of_rank(start + old);
            let own = &planned[(start + new) * width..(start + new + 1) * width];
            let arrives =
                |(i, e): (usize, &u32)| *e != NONE && !held.contains(&(*e as i32)) && !own[..i].contains(e);
            own.iter().enumerate().filter(|pair| arrives(*pair)).count() as i64
        };
        let values: Vec<i64> = (0..per_node)
            .flat_map(|new| (0..per_node).map(move |old| (new, old)))
            .map(|(new, old)| -arrivals(new, old))
            .collect();
        for (new, old) in best_matching(&values, per_node).into_iter().enumerate() {
            let own = &planned[(start + new) * width..(start + new + 1) * width];
            let slots = (start + old) * width..(start + old + 1) * width;
            keep_slots(own, current.slots_of_rank(start + old), &mut aligned[slots]);
        }
    }
    aligned
}

/// Keeps the ranks of a plan as they are; what stays on a rank keeps its slot.
pub fn keep_all_slots(planned: &[u32], current: LayerPlacement<'_>) -> Vec<u32> {
    let width = current.slots_per_rank();
    let mut kept = vec![NONE; planned.len()];
    for (rank, own) in planned.chunks(width).enumerate() {
        keep_slots(own, current.slots_of_rank(rank), &mut kept[rank * width..(rank + 1) * width]);
    }
    kept
}

/// Puts a rank's experts into its slots: those that are there stay, the others fill the rest in order.
fn keep_slots(planned: &[u32], now: &[i32], slots: &mut [u32]) {
    let mut arriving: Vec<u32> = planned.iter().copied().filter(|e| *e != NONE).collect();
    for (slot, &held) in slots.iter_mut().zip(now) {
        if let Some(i) = arriving.iter().position(|e| *e as i32 == held) {
            *slot = arriving.remove(i);
        }
    }
    let mut arriving = arriving.into_iter();
    for slot in slots.iter_mut().filter(|slot| **slot == NONE) {
        *slot = arriving.next().unwrap_or(NONE);
    }
}

/// The old rank for each new one such that their values, `[new][old]`, add up to most.
fn best_matching(values: &[i64], n: usize) -> Vec<usize> {
    if n <= MAX_MATCHED_RANKS { hungarian(values, n) } else { greedy(values, n) }
}

/// The largest pairs first.
fn greedy(values: &[i64], n: usize) -> Vec<usize> {
    let mut pairs: Vec<(i64, usize)> = values.iter().copied().zip(0..).collect();
    pairs.sort_unstable_by_key(|(value, index)| (-value, *index));
    let (mut old_of, mut taken) = (vec![usize::MAX; n], vec![false; n]);
    for (_, index) in pairs {
        let (new, old) = (index / n, index % n);
        if old_of[new] == usize::MAX && !taken[old] {
            (old_of[new], taken[old]) = (old, true);
        }
    }
    old_of
}

/// Shortest augmenting paths with potentials (Kuhn, Munkres; the O(n^3) form of Jonker and Volgenant), on negated values.
fn hungarian(values: &[i64], n: usize) -> Vec<usize> {
    // Row and column 0 are a sentinel; columns are old ranks.
    let (mut row_of, mut row_potential, mut column_potential) =
        (vec![0; n + 1], vec![0i64; n + 1], vec![0i64; n + 1]);
    let mut came_from = vec![0; n + 1];
    for row in 1..=n {
        row_of[0] = row;
        let (mut slack, mut done) = (vec![i64::MAX; n + 1], vec![false; n + 1]);
        let mut column = 0;
        while row_of[column] != 0 {
            done[column] = true;
            let current = row_of[column];
            let (mut least, mut next) = (i64::MAX, 0);
            for j in 1..=n {
                if done[j] {
                    continue;
                }
                let reduced =
                    -values[(current - 1) * n + j - 1] - row_potential[current] - column_potential[j];
                if reduced < slack[j] {
                    (slack[j], came_from[j]) = (reduced, column);
                }
                if slack[j] < least {
                    (least, next) = (slack[j], j);
                }
            }
            for j in 0..=n {
                if done[j] {
                    row_potential[row_of[j]] += least;
                    column_potential[j] -= least;
                } else {
                    slack[j] = slack[j].saturating_sub(least);
                }
            }
            column = next;
        }
        while column != 0 {
            row_of[column] = row_of[came_from[column]];
            column = came_from[column];
        }
    }
    let mut old_of = vec![0; n];
    (1..=n).for_each(|column| old_of[row_of[column] - 1] = column - 1);
    old_of
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Placement;
    use proptest::prelude::*;

    #[test]
    fn ranks_are_renamed_and_slots_kept() {
        let now = Placement::new(2, 3, 4, vec![0], vec![vec![0, 1, -1, 3, 2, 0]]).unwrap();
        let planned = [2, 3, NONE, 1, 0, 3];
        assert_eq!(align(&planned, now.layer(0), 1), [0, 1, 3, 3, 2, NONE]);
        assert_eq!(align(&planned, now.layer(0), 2), [2, 3, NONE, 3, 1, 0], "nodes are not renamed");
    }

    #[test]
    fn a_second_copy_on_a_rank_counts_for_nothing() {
        let now = Placement::new(2, 5, 5, vec![0], vec![vec![0, 1, 2, -1, -1, 0, 3, 4, -1, -1]]).unwrap();
        // Two arrivals where three slots have an expert in common, one where two slots have.
        let planned = [0, 0, 0, 0, 0, 1, 2, 3, 3, 3];
        assert_eq!(align(&planned, now.layer(0), 1), [3, 1, 2, 3, 3, 0, 0, 0, 0, 0]);
    }

    fn value(values: &[i64], n: usize, old_of: &[usize]) -> i64 {
        old_of.iter().enumerate().map(|(new, old)| values[new * n + old]).sum()
    }

    /// The best of all permutations.
    fn best_value(values: &[i64], n: usize, new: usize, taken: &mut Vec<bool>) -> i64 {
        if new == n {
            return 0;
        }
        let mut best = i64::MIN;
        for old in 0..n {
            if !taken[old] {
                taken[old] = true;
                best = best.max(values[new * n + old] + best_value(values, n, new + 1, taken));
                taken[old] = false;
            }
        }
        best
    }

    proptest! {
        #[test]
        fn matching_is_best(n in 1usize..6, values in prop::collection::vec(-3i64..3, 36)) {
            let values = &values[..n * n];
            let best = best_value(values, n, 0, &mut vec![false; n]);
            prop_assert_eq!(value(values, n, &hungarian(values, n)), best);
            let mut greedy = greedy(values, n);
            prop_assert!(value(values, n, &greedy) <= best);
            greedy.sort_unstable();
            prop_assert_eq!(greedy, (0..n).collect::<Vec<_>>());
        }
    }
}
