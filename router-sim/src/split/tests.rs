//! Every split against its promises.

use super::*;
use crate::load::{LoadWindow, Phase};
use crate::placement::{LayerPlacement, Placement};
use proptest::prelude::*;

fn placement(ranks: usize, experts: usize, slots: Vec<i32>) -> Placement {
    Placement::new(ranks, slots.len() / ranks, experts, vec![0], vec![slots]).unwrap()
}

#[test]
fn tokens_are_cut_into_contiguous_runs() {
    // Expert 0 on slots 0 and 3, 5 tokens from source 0 and 2 from source 1: runs of 4 and 3.
    let placement = placement(2, 2, vec![0, 1, -1, 0]);
    let mut plan = SplitPlan::new(Split::Even);
    plan.rebuild(placement.layer(0), &[5, 1, 2, 0]);
    assert_eq!(plan.quotas(0), [4, 1, 0, 1]);
    assert_eq!(plan.quotas(1), [0, 0, 0, 2]);
    assert_eq!(plan.quotas_to(0, 1), [0, 1]);
    plan.deal(0);
    let dealt: Vec<usize> = [0, 0, 1, 0, 0, 0].iter().map(|&e| plan.next_slot(e)).collect();
    assert_eq!(dealt, [0, 0, 1, 0, 0, 3]);
}

#[test]
fn idle_sources_and_idle_layers() {
    let placement = placement(1, 1, vec![0]);
    let mut plan = SplitPlan::new(Split::Even);
    for counts in [&[][..], &[0], &[0, 0, 0]] {
        plan.rebuild(placement.layer(0), counts);
        assert_eq!(plan.sources(), counts.len());
        assert!((0..plan.sources()).all(|s| plan.quotas(s) == [0]));
    }
}

#[test]
#[should_panic(expected = "expert 0 was dealt more rows")]
fn dealing_more_than_counted_is_a_bug() {
    let placement = placement(1, 1, vec![0]);
    let mut plan = SplitPlan::new(Split::Even);
    plan.rebuild(placement.layer(0), &[1]);
    plan.deal(0);
    plan.next_slot(0);
    plan.next_slot(0);
}

#[test]
fn huge_counts_do_not_overflow() {
    let placement = placement(2, 1, vec![0, 0]);
    let mut plan = SplitPlan::new(Split::Even);
    plan.rebuild(placement.layer(0), &[u32::MAX, u32::MAX, u32::MAX]);
    assert_eq!(plan.quotas(0), [u32::MAX, 0]);
    assert_eq!(plan.quotas(1), [u32::MAX / 2 + 1, u32::MAX / 2]);
    assert_eq!(plan.quotas(2), [0, u32::MAX]);
}

#[test]
fn balancedness_of_a_window() {
    let placement = placement(2, 3, vec![0, 1, 0, 2]);
    let mut load = LoadWindow::new(&[0], 3);
    assert_eq!(even_balancedness(&load, &placement), [1.0]);
    load.add(Phase::Prefill, 0, &[4, 3, 0]);
    load.add(Phase::Decode, 0, &[0, 0, 1]);
    assert_eq!(even_rank_loads(placement.layer(0), &[4, 3, 1]), [5, 3]);
    assert_eq!(even_balancedness(&load, &placement), [0.8]);
}

/// A layer where every expert has a slot and the others hold anything, and counts of up to 5 sources.
fn cases() -> impl Strategy<Value = (Placement, Vec<u32>)> {
    (1usize..6, 1usize..9, 0usize..12, 0usize..5).prop_flat_map(|(ranks, experts, extra, sources)| {
        let width = (experts + extra).next_multiple_of(ranks);
        let filling = prop::collection::vec(-1..experts as i32, width - experts);
        let slots = filling.prop_map(move |more| (0..experts as i32).chain(more).collect()).prop_shuffle();
        let count = prop_oneof![Just(0u32), 0u32..40];
        let counts = prop::collection::vec(count, sources * experts);
        (slots.prop_map(move |s: Vec<i32>| placement(ranks, experts, s)), counts)
    })
}

const ALL: [Split; 7] = [
    Split::Even,
    Split::Random { seed: 1 },
    Split::Nearest { ranks_per_node: 2 },
    Split::WaterFill,
    Split::Exact,
    Split::ACTIVATED,
    Split::Activated { expert_cost: 7, token_cost: 2 },
];

fn totals(experts: usize, counts: &[u32]) -> Vec<u64> {
    (0..experts).map(|e| counts.iter().skip(e).step_by(experts).map(|n| u64::from(*n)).sum()).collect()
}

/// Tokens per slot over all sources.
fn per_slot(plan: &SplitPlan, slots: usize) -> Vec<u64> {
    let mut sums = vec![0; slots];
    for source in 0..plan.sources() {
        sums.iter_mut().zip(plan.quotas(source)).for_each(|(sum, n)| *sum += u64::from(*n));
    }
    sums
}

fn rank_loads(layer: LayerPlacement<'_>, tokens: &[u64]) -> Vec<u64> {
    tokens.chunks(layer.slots_per_rank()).map(|held| held.iter().sum()).collect()
}

/// Every non-empty set of ranks, by its bits: tokens of experts that live there only, and the number of ranks.
fn rank_sets(layer: LayerPlacement<'_>, tokens: &[u64]) -> Vec<(usize, u64, u64)> {
    let inside =
        |set: usize, e: usize| layer.replicas(e).iter().all(|s| set >> layer.rank_of(*s as usize) & 1 == 1);
    let held = |set| (0..tokens.len()).filter(|e| inside(set, *e)).map(|e| tokens[e]).sum::<u64>();
    (1usize..1 << layer.ranks()).map(|set| (set, held(set), u64::from(set.count_ones()))).collect()
}

/// Whether a chain of moves of one token each leads from one rank to another; `[ranks][ranks]`.
fn chains(layer: LayerPlacement<'_>, tokens: &[u64]) -> Vec<Vec<bool>> {
    let mut reach = vec![vec![false; layer.ranks()]; layer.ranks()];
    for e in 0..layer.experts() {
        for &from in layer.replicas(e).iter().filter(|s| tokens[**s as usize] > 0) {
            for &to in layer.replicas(e) {
                reach[layer.rank_of(from as usize)][layer.rank_of(to as usize)] = true;
            }
        }
    }
    for middle in 0..layer.ranks() {
        for from in 0..layer.ranks() {
            for to in 0..layer.ranks() {
                reach[from][to] |= reach[from][middle] && reach[middle][to];
            }
        }
    }
    reach
}

/// Largest max(activated x a, tokens x b) of a rank.
fn decode_cost(layer: LayerPlacement<'_>, tokens: &[u64], a: u64, b: u64) -> u64 {
    let ranks = tokens.chunks(layer.slots_per_rank());
    let cost =
        |held: &[u64]| (a * held.iter().filter(|n| **n > 0).count() as u64).max(b * held.iter().sum::<u64>());
    ranks.map(cost).max().unwrap()
}

/// The smallest largest number of activated experts, each whole on one replica: all ways tried.
fn fewest_activated(layer: LayerPlacement<'_>, tokens: &[u64]) -> u64 {
    fn place(layer: LayerPlacement<'_>, active: &[usize], held: &mut Vec<u64>, best: &mut u64) {
        let most = held.iter().copied().max().unwrap();
        match active.split_first() {
            _ if most >= *best => {}
            None => *best = most,
            Some((e, rest)) => {
                for slot in layer.replicas(*e) {
                    let rank = layer.rank_of(*slot as usize);
                    held[rank] += 1;
                    place(layer, rest, held, best);
                    held[rank] -= 1;
                }
            }
        }
    }
    let active: Vec<usize> = (0..tokens.len()).filter(|e| tokens[*e] > 0).collect();
    let mut best = u64::MAX;
    place(layer, &active, &mut vec![0; layer.ranks()], &mut best);
    best
}

#[test]
fn names_round_trip() {
    for name in Split::NAMES {
        assert_eq!(name.parse::<Split>().unwrap().to_string(), name);
    }
    assert!("lp".parse::<Split>().unwrap_err().to_string().contains("\"lp\" is not one of even, random"));
}

#[test]
fn exact_moves_tokens_along_chains() {
    // Rank 0 can relieve itself only through rank 1, which passes its own tokens on to rank 2.
    let placement = placement(3, 3, vec![0, 2, 0, 1, 1, -1]);
    let mut shares = Shares::default();
    let tokens = shares.share(Split::Exact, placement.layer(0), &[6, 6, 3]).unwrap();
    assert_eq!(rank_loads(placement.layer(0), tokens), [5, 5, 5]);
    let optimum = shares.optimum(placement.layer(0), &[6, 6, 3]).unwrap();
    assert_eq!(optimum, Optimum { max_load: 5.0, tokens: 15, ranks: vec![0, 1, 2] });
    let optimum = shares.optimum(placement.layer(0), &[1, 1, 12]).unwrap();
    assert_eq!(optimum, Optimum { max_load: 12.0, tokens: 12, ranks: vec![0] });
}

#[test]
fn exact_keeps_tokens_at_home() {
    // Both ranks hold both experts: every token can stay with its source.
    let placement = placement(2, 2, vec![0, 1, 0, 1]);
    let mut plan = SplitPlan::new(Split::Exact);
    plan.rebuild(placement.layer(0), &[3, 5, 5, 3]);
    assert_eq!(plan.quotas(0), [3, 5, 0, 0]);
    assert_eq!(plan.quotas(1), [0, 0, 5, 3]);
}

#[test]
fn shares_have_limits() {
    let placement = placement(2, 2, vec![0, 1, 0, 1]);
    let mut shares = Shares::default();
    let layer = placement.layer(0);
    assert_eq!(shares.share(Split::Exact, layer, &[MAX_TOKENS, 0]).unwrap().iter().sum::<u64>(), MAX_TOKENS);
    for tokens in [[MAX_TOKENS, 1], [u64::MAX, u64::MAX]] {
        let error = shares.share(Split::Exact, layer, &tokens).unwrap_err().to_string();
        assert!(error.contains("exceed the limit of 9223372036854775807"), "{error}");
        assert!(shares.optimum(layer, &tokens).is_err());
    }
    let error = shares.share("random".parse().unwrap(), layer, &[1, 1]).unwrap_err().to_string();
    assert!(error.contains("split random needs the tokens of each source rank"), "{error}");
}

#[test]
fn random_draws_are_fair_and_depend_on_the_seed() {
    let placement = placement(2, 1, vec![0, 0]);
    let drawn = |seed| {
        let mut plan = SplitPlan::new(Split::Random { seed });
        plan.rebuild(placement.layer(0), &[10_000]);
        plan.quotas(0).to_vec()
    };
    let first = drawn(0);
    // Five standard deviations of 50.
    assert!(first[0].abs_diff(5_000) < 250, "{first:?}");
    assert_ne!(first, drawn(1));
}

#[test]
fn nearest_is_rank_then_node_then_anywhere() {
    // Ranks 0 and 1 are a node, 2 and 3 another. Expert 0 on ranks 0 and 2, expert 1 on ranks 1 and 3.
    let placement = placement(4, 2, vec![0, 1, 0, 1]);
    let mut plan = SplitPlan::new(Split::Nearest { ranks_per_node: 2 });
    plan.rebuild(placement.layer(0), &[1; 8]);
    for (source, quotas) in [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]].iter().enumerate() {
        assert_eq!(plan.quotas(source), quotas);
    }
    // Two source ranks per expert-parallel rank; without nodes, those that do not hold it take turns.
    let mut plan = SplitPlan::new(Split::Nearest { ranks_per_node: 0 });
    plan.rebuild(placement.layer(0), &[1; 16]);
    assert_eq!(plan.quotas(0), [1, 1, 0, 0]);
    assert_eq!(plan.quotas(1), [1, 0, 0, 1]);
    assert_eq!(plan.quotas(4), [0, 1, 1, 0]);
}

proptest! {
    #[test]
    fn every_token_has_one_slot_of_its_expert((placement, counts) in cases()) {
        let layer = placement.layer(0);
        let experts = layer.experts();
        for split in ALL {
            let mut plan = SplitPlan::new(split);
            // A reused plan and a fresh one agree.
            plan.rebuild(layer, &vec![3; 7 * experts]);
            plan.deal(6);
            plan.rebuild(layer, &counts);
            let mut fresh = SplitPlan::new(split);
            fresh.rebuild(layer, &counts);
            prop_assert_eq!(plan.sources(), counts.len() / experts);
            for (source, counts) in counts.chunks(experts).enumerate() {
                prop_assert_eq!(plan.quotas(source), fresh.quotas(source));
                for (expert, &count) in counts.iter().enumerate() {
                    let sent: u32 = layer.replicas(expert).iter().map(|s| plan.quotas(source)[*s as usize]).sum();
                    prop_assert_eq!(sent, count);
                }
                prop_assert_eq!(plan.quotas(source).iter().sum::<u32>(), counts.iter().sum::<u32>());
                let mut dealt = vec![0; placement.slots()];
                let mut last = vec![0; experts];
                plan.deal(source);
                for (expert, &rows) in counts.iter().enumerate().rev() {
                    for _ in 0..rows {
                        let slot = plan.next_slot(expert);
                        prop_assert_eq!(layer.expert_of(slot), Some(expert));
                        prop_assert!(slot >= last[expert]);
                        last[expert] = slot;
                        dealt[slot] += 1;
                    }
                }
                prop_assert_eq!(&dealt[..], plan.quotas(source));
            }
        }
    }

    #[test]
    fn even_shares_differ_by_one((placement, counts) in cases()) {
        let layer = placement.layer(0);
        let mut plan = SplitPlan::new(Split::Even);
        plan.rebuild(layer, &counts);
        let tokens = per_slot(&plan, placement.slots());
        for expert in 0..layer.experts() {
            let loads: Vec<u64> = layer.replicas(expert).iter().map(|s| tokens[*s as usize]).collect();
            prop_assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1, "{:?}", loads);
        }
        prop_assert_eq!(even_rank_loads(layer, &totals(layer.experts(), &counts)), rank_loads(layer, &tokens));
    }

    #[test]
    fn exact_is_optimal_and_decreasingly_minimal((placement, counts) in cases()) {
        let layer = placement.layer(0);
        let mut plan = SplitPlan::new(Split::Exact);
        plan.rebuild(layer, &counts);
        let tokens = per_slot(&plan, placement.slots());
        let loads = rank_loads(layer, &tokens);
        let all = totals(layer.experts(), &counts);
        let sets = rank_sets(layer, &all);
        let best = sets.iter().map(|(_, held, ranks)| held.div_ceil(*ranks)).max().unwrap();
        prop_assert_eq!(*loads.iter().max().unwrap(), best);
        let reach = chains(layer, &tokens);
        for (from, reached) in reach.iter().enumerate() {
            for (to, _) in reached.iter().enumerate().filter(|(_, reached)| **reached) {
                prop_assert!(loads[from] < loads[to] + 2, "rank {} can relieve rank {}: {:?}", to, from, loads);
            }
        }
        let optimum = Shares::default().optimum(layer, &all).unwrap();
        let (held, ranks) = sets.iter().map(|(_, held, ranks)| (*held, *ranks))
            .max_by(|a, b| (a.0 * b.1).cmp(&(b.0 * a.1))).unwrap();
        prop_assert_eq!(optimum.max_load, held as f64 / ranks as f64);
        let bits = optimum.ranks.iter().map(|rank| 1usize << rank).sum::<usize>();
        prop_assert_eq!(sets[bits - 1], (bits, optimum.tokens, optimum.ranks.len() as u64));
        prop_assert_eq!(optimum.tokens * ranks, held * optimum.ranks.len() as u64);
    }

    #[test]
    fn activated_is_never_dearer_than_the_extremes((placement, counts) in cases(), a in 0u32..20, b in 0u32..4) {
        let layer = placement.layer(0);
        let all = totals(layer.experts(), &counts);
        let mut shares = Shares::default();
        let split = Split::Activated { expert_cost: a, token_cost: b };
        let cost = |tokens: &[u64], a: u32, b: u32| decode_cost(layer, tokens, u64::from(a), u64::from(b));
        let own = cost(shares.share(split, layer, &all).unwrap(), a, b);
        for other in [Split::Even, Split::Exact] {
            let tokens = shares.share(other, layer, &all).unwrap();
            prop_assert!(other == Split::Even || own <= cost(tokens, a, b));
        }
        let fewest = fewest_activated(layer, &all);
        let only_experts = Split::Activated { expert_cost: 1, token_cost: 0 };
        prop_assert_eq!(cost(shares.share(only_experts, layer, &all).unwrap(), 1, 0), fewest);
        let best_load = rank_sets(layer, &all).iter().map(|(_, held, ranks)| held.div_ceil(*ranks)).max().unwrap();
        prop_assert!(own >= (u64::from(a) * fewest).max(u64::from(b) * best_load));
    }
}
