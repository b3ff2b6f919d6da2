//! The best tokens of a row, without sorting it.

use std::cmp::Ordering;

use super::weights::Weights;

/// Up to this many best tokens are found by insertion in one pass; more by quickselect.
const FEW: usize = 256;

/// The token with the highest logit, the lowest id among equals.
///
/// # Panics
/// When there is none: in a row that is empty or holds a NaN.
pub fn argmax(logits: &[f32]) -> u32 {
    // One maximum per lane: the compiler turns this into vector instructions, which a single running maximum forbids.
    const LANES: usize = 16;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = logits.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    let max = lanes.iter().chain(chunks.remainder()).fold(f32::NEG_INFINITY, |max, &x| max.max(x));
    logits.iter().position(|&logit| logit == max).expect("a row without NaN has a maximum") as u32
}

/// Best first: higher logit, then lower id.
pub(super) fn order(logits: &[f32], a: u32, b: u32) -> Ordering {
    let by_logit = logits[b as usize].partial_cmp(&logits[a as usize]);
    by_logit.expect("logits are no NaN").then(a.cmp(&b))
}

/// The place of `token` among all, from 1: how many are at least as good.
pub fn rank(logits: &[f32], token: u32) -> u32 {
    let own = logits[token as usize];
    let (before, after) = logits.split_at(token as usize);
    let better = before.iter().filter(|&&x| x >= own).count() + after.iter().filter(|&&x| x > own).count();
    better as u32 + 1
}

/// Selects the `n` best tokens (all, when there are fewer), best first.
pub fn select_best(ids: &mut Vec<u32>, logits: &[f32], n: usize) {
    ids.clear();
    if n > FEW {
        ids.extend(0..logits.len() as u32);
        if n < ids.len() {
            ids.select_nth_unstable_by(n - 1, |&a, &b| order(logits, a, b));
            ids.truncate(n);
        }
        return ids.sort_unstable_by(|&a, &b| order(logits, a, b));
    }
    if n == 0 {
        return;
    }
    // Ids come in ascending order, so a later one must be strictly better to come before an earlier one.
    let mut worst = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if ids.len() == n && logit <= worst {
            continue;
        }
        ids.truncate(n - 1);
        let place = ids.partition_point(|&other| logits[other as usize] >= logit);
        ids.insert(place, id as u32);
        worst = logits[ids[ids.len() - 1] as usize];
    }
}

/// Moves the fewest best tokens whose weights reach `mass` to the front of `ids`; returns how many, at least one; all, where they do
/// not. Quickselect by weight: halves the candidates until few are left to sort, O(ids) in all.
pub fn fewest(ids: &mut [u32], logits: &[f32], weights: &Weights, mass: u64) -> usize {
    let better = |&a: &u32, &b: &u32| order(logits, a, b);
    // Those before `start` are in; those from `end` on are out.
    let (mut start, mut end, mut sum) = (0, ids.len(), 0);
    while end - start > 32 {
        let half = start + (end - start) / 2;
        ids[start..end].select_nth_unstable_by(half - start, better);
        let more = weights.mass_of(&ids[start..half]);
        if sum + more >= mass {
            end = half;
        } else {
            (start, sum) = (half, sum + more);
        }
    }
    ids[start..end].sort_unstable_by(better);
    let last = ids[start..end].iter().position(|&id| {
        sum += weights.of(id);
        sum >= mass
    });
    last.map_or(end, |last| start + last + 1)
}
