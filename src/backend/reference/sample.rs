//! Choosing tokens, as [`crate::backend::draw`] says it: one full sort.

use crate::backend::draw::{Draw, part, reached_by, units, weight};

/// The token of a row, and its elements that are not finite.
pub(super) fn sample(row: &[f32], draw: &Draw) -> [i32; 2] {
    let infinite = row.iter().filter(|x| !x.is_finite()).count();
    if infinite > 0 {
        return [0, infinite as i32];
    }
    let mut ids: Vec<usize> = (0..row.len()).collect();
    // Stable: equals stay in the order of their ids.
    ids.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).expect("finite numbers"));
    let best = ids[0];
    if draw.temperature == 0.0 {
        return [best as i32, 0];
    }
    let weigh = |id: usize| units(weight(row[id], row[best], draw.temperature, draw.min_p));
    let mass = |ids: &[usize]| ids.iter().map(|&id| weigh(id)).sum::<u64>();
    let first_reaching = |ids: &[usize], wanted: u64| {
        let mut sum = 0;
        ids.iter().position(|&id| {
            sum += weigh(id);
            sum >= wanted
        })
    };
    if draw.top_k > 0 {
        ids.truncate(draw.top_k as usize);
    }
    if draw.top_p < 1.0 {
        let last = first_reaching(&ids, reached_by(draw.top_p, mass(&ids)));
        ids.truncate(last.expect("all of them weigh more") + 1);
    }
    ids.sort_unstable();
    let drawn = first_reaching(&ids, part(draw.random, mass(&ids)) + 1);
    [ids[drawn.expect("all of them weigh more")] as i32, 0]
}
