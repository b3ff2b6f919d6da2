//! A first layout, for exchanges to improve.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::layout::{Layout, NONE, bits};

/// Fills an empty layout: the heaviest copies first, each to the least loaded rank that has room and does not hold the
/// expert. No rank holds an expert twice. With `web`, the copies of replicated experts are dealt out before all others by
/// [`spin_web`].
///
/// # Panics
/// When the copies do not fit, or an expert has more copies than there are ranks.
pub fn fill(layout: &mut Layout, web: bool) {
    let mut items: Vec<(u64, u32)> = Vec::with_capacity(layout.slots.len());
    for e in 0..layout.copies.len() {
        assert!(
            layout.copies[e] as usize <= layout.ranks,
            "{} copies on {} ranks",
            layout.copies[e],
            layout.ranks
        );
        let share = layout.share(e as u32).iter().sum::<f64>();
        items.extend((0..layout.copies[e]).map(|_| (share.to_bits(), e as u32)));
    }
    assert!(items.len() <= layout.slots.len(), "{} copies in {} slots", items.len(), layout.slots.len());
    items.sort_unstable_by_key(|(share, expert)| (Reverse(*share), *expert));
    let mut held = vec![0; layout.ranks];
    if web {
        spin_web(layout, &items, &mut held);
        items.retain(|(_, expert)| layout.copies[*expert as usize] == 1);
    }
    let open = |rank: &usize| held[*rank] < layout.slots_per_rank;
    let mut lightest: BinaryHeap<_> =
        (0..layout.ranks).filter(open).map(|rank| Reverse((key(layout, rank), rank))).collect();
    let mut passed = Vec::new();
    for (_, expert) in items {
        let rank = loop {
            match lightest.pop() {
                Some(Reverse((_, rank))) if !layout.holds(rank, expert) => break Some(rank),
                Some(holder) => passed.push(holder),
                None => break None,
            }
        };
        lightest.extend(passed.drain(..));
        let rank = match rank {
            Some(rank) => {
                layout.put(rank * layout.slots_per_rank + held[rank], expert);
                rank
            }
            None => {
                let Reverse((_, rank)) = lightest.pop().expect("a slot for every copy");
                make_room(layout, expert, rank * layout.slots_per_rank + held[rank]);
                rank
            }
        };
        held[rank] += 1;
        if held[rank] < layout.slots_per_rank {
            lightest.push(Reverse((key(layout, rank), rank)));
        }
    }
}

/// Deals out the copies of replicated experts, which are what a split can move tokens between, so that tokens find a way
/// from any rank to any other: equally many copies on each rank, and each next copy of an expert as far as can be, over
/// experts that two ranks have in common, from the ranks that hold it. `held` counts slots in use.
fn spin_web(layout: &mut Layout, items: &[(u64, u32)], held: &mut [usize]) {
    let words = layout.ranks.div_ceil(64);
    // A bit per rank: those that share an expert with a rank; those in a set.
    let mut linked = vec![0u64; layout.ranks * words];
    let (mut hosts, mut reached, mut wanted) = (vec![0u64; words], vec![0u64; words], vec![0u64; words]);
    let mut last = NONE;
    for &(_, expert) in items {
        if layout.copies[expert as usize] == 1 {
            continue;
        }
        if expert != last {
            hosts.fill(0);
            last = expert;
        }
        let free = (0..layout.ranks).filter(|rank| hosts[rank / 64] >> (rank % 64) & 1 == 0);
        let fewest = free.clone().map(|rank| held[rank]).min().expect("no more copies than ranks");
        assert!(
            fewest < layout.slots_per_rank,
            "copies of replicated experts in {} slots",
            layout.slots.len()
        );
        wanted.fill(0);
        free.filter(|rank| held[*rank] == fewest).for_each(|rank| wanted[rank / 64] |= 1 << (rank % 64));
        keep_farthest(&mut wanted, &hosts, &mut reached, &linked);
        let rank =
            bits(&wanted).min_by(|a, b| key(layout, *a).cmp(&key(layout, *b))).expect("a farthest rank");
        layout.put(rank * layout.slots_per_rank + held[rank], expert);
        held[rank] += 1;
        for host in bits(&hosts) {
            linked[host * words + rank / 64] |= 1 << (rank % 64);
            linked[rank * words + host / 64] |= 1 << (host % 64);
        }
        hosts[rank / 64] |= 1 << (rank % 64);
    }
}

/// Leaves in `wanted` the ranks farthest from `hosts`, by links.
fn keep_farthest(wanted: &mut [u64], hosts: &[u64], reached: &mut [u64], linked: &[u64]) {
    let words = wanted.len();
    reached.copy_from_slice(hosts);
    let mut edge: Vec<usize> = bits(hosts).collect();
    while !edge.is_empty() {
        let before = reached.to_vec();
        for rank in edge {
            reached.iter_mut().zip(&linked[rank * words..]).for_each(|(r, l)| *r |= l);
        }
        if wanted.iter().zip(reached.iter()).all(|(w, r)| w & !r == 0) {
            return;
        }
        wanted.iter_mut().zip(reached.iter()).for_each(|(w, r)| *w &= !r);
        let new: Vec<u64> = reached.iter().zip(&before).map(|(r, b)| r & !b).collect();
        edge = bits(&new).collect();
    }
}

/// Load over all scenes as ordered bits.
fn key(layout: &Layout, rank: usize) -> u64 {
    layout.load(rank).iter().sum::<f64>().to_bits()
}

/// All ranks with room hold the expert: some full rank that does not gives one of its own to the open slot. There is
/// one, because it holds more experts than the open rank.
fn make_room(layout: &mut Layout, expert: u32, open: usize) {
    let open_rank = open / layout.slots_per_rank;
    let mut best: Option<(f64, usize)> = None;
    for slot in 0..layout.slots.len() {
        let rank = slot / layout.slots_per_rank;
        let moved = layout.slots[slot];
        if moved == NONE || layout.holds(rank, expert) || layout.holds(open_rank, moved) {
            continue;
        }
        let sum = |loads: &[f64]| loads.iter().sum::<f64>();
        let (own, new) = (sum(layout.share(moved)), sum(layout.share(expert)));
        let worst = (sum(layout.load(rank)) - own + new).max(sum(layout.load(open_rank)) + own);
        if best.is_none_or(|(least, _)| worst < least) {
            best = Some((worst, slot));
        }
    }
    let (_, slot) = best.expect("a rank without the expert holds one that is new to the open rank");
    let moved = layout.take(slot);
    layout.put(open, moved);
    layout.put(slot, expert);
}

/// Puts an expert without a slot somewhere: into the empty slot, or in place of the spare copy, that leaves its rank the
/// least load.
///
/// # Panics
/// When there is neither.
pub fn bring_back(layout: &mut Layout, expert: u32, usable: &impl Fn(usize) -> bool) {
    let sum = |loads: &[f64]| loads.iter().sum::<f64>();
    let freed = |slot: usize| match layout.slots[slot] {
        NONE => Some(0.0),
        old if layout.copies[old as usize] > 1 => Some(sum(layout.share(old))),
        _ => None,
    };
    let after =
        |slot: usize| freed(slot).map(|freed| (sum(layout.load(slot / layout.slots_per_rank)) - freed, slot));
    let candidates = (0..layout.slots.len()).filter(|slot| usable(*slot)).filter_map(after);
    let best = candidates.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let (_, slot) = best.expect("as many slots as experts");
    layout.replace(slot, NONE);
    layout.put(slot, expert);
}
