//! The token-to-expert router.

use super::CpuBackend;
use super::memory::{Rows, RowsMut, with_local_scratch};
use super::rows::for_rows;
use super::simd::{Kernel, MAX_LANES, Simd, exp, sigmoid};
use crate::backend::{View, ViewMut, check};
use crate::error::Result;
use crate::spec::{ExpertGroups, GroupScore, Renormalize, Router, Score};

/// Looking whether a score is among the best takes as long as streaming so many elements.
const CHOICE: usize = 2;

/// A row of scores in whole vectors: NaN, which is never greater, follows the last.
fn padded(scores: usize) -> usize {
    scores.next_multiple_of(MAX_LANES)
}

/// `x[i] = e^(x[i] - max) / sum` for the first `len` elements of a padded row.
#[inline(always)]
fn softmax<S: Simd>(simd: S, x: &mut [f32], len: usize) {
    let (whole, at) = (x.len(), x.as_mut_ptr());
    let mut max = simd.splat(f32::NEG_INFINITY);
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: a padded row is whole vectors.
        max = simd.max(unsafe { simd.load(at.add(i)) }, max);
    }
    let max = simd.splat(simd.max_lane(max));
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: as above.
        unsafe { simd.store(at.add(i), exp(simd, simd.sub(simd.load(at.add(i)), max))) };
    }
    let sum = simd.splat(x[..len].iter().sum());
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: as above.
        unsafe { simd.store(at.add(i), simd.div(simd.load(at.add(i)), sum)) };
    }
}

/// Fills `chosen` with the indices of the largest values of a padded row, best first; ties go to the lowest index.
#[inline(always)]
fn top<S: Simd>(simd: S, values: &[f32], chosen: &mut [i32]) {
    if values[..chosen.len()].iter().any(|value| value.is_nan()) {
        return insert_each(values, chosen);
    }
    // Each round finds the greatest of those below the last one found, and all that equal it: the first `chosen.len()` values
    // are numbers, so there are enough of them.
    let none = simd.splat(f32::NEG_INFINITY);
    // Nothing is as great as NaN.
    let mut last = simd.splat(f32::NAN);
    let mut found = 0;
    while found < chosen.len() {
        let mut best = none;
        for i in (0..values.len()).step_by(S::LANES) {
            // SAFETY: a padded row is whole vectors.
            let v = unsafe { simd.load(values.as_ptr().add(i)) };
            best = simd.max(simd.at_least(v, last, none, v), best);
        }
        last = simd.splat(simd.max_lane(best));
        for (word, values) in values.chunks(u64::BITS as usize).enumerate() {
            let mut equal = 0u64;
            for i in (0..values.len()).step_by(S::LANES) {
                // SAFETY: a word of lanes is whole vectors, and so is a padded row.
                equal |= u64::from(simd.equal(unsafe { simd.load(values.as_ptr().add(i)) }, last)) << i;
            }
            while equal != 0 && found < chosen.len() {
                chosen[found] = (word as u32 * u64::BITS + equal.trailing_zeros()) as i32;
                found += 1;
                equal &= equal - 1;
            }
        }
    }
}

/// [`top`] where some of the first values are not numbers. NaN compares with nothing: it stays where it was inserted, those before
/// it in front and the best of those after it behind.
#[cold]
fn insert_each(values: &[f32], chosen: &mut [i32]) {
    let mut len = 0;
    for (i, &value) in values.iter().enumerate() {
        // Equal values were there first and have lower indices, so they stay in front.
        let mut at = len;
        while at > 0 && value > values[chosen[at - 1] as usize] {
            at -= 1;
        }
        if at < chosen.len() {
            len = (len + 1).min(chosen.len());
            chosen.copy_within(at..len - 1, at + 1);
            chosen[at] = i as i32;
        }
    }
}

/// The greatest value; NaN counts for nothing.
#[inline(always)]
fn best_of(values: &[f32]) -> f32 {
    values.iter().fold(f32::NEG_INFINITY, |best, &value| if value > best { value } else { best })
}

/// Sum of the two largest values; of the only one, where there is one. NaN among the first two stays, as in [`top`].
#[inline(always)]
fn best_two(values: &[f32]) -> f32 {
    let [first, second, rest @ ..] = values else { return values[0] };
    let ordered = |a: f32, b: f32| if b > a { (b, a) } else { (a, b) };
    let (mut best, mut next) = ordered(*first, *second);
    for &value in rest {
        (best, next) = ordered(best, if value > next { value } else { next });
    }
    best + next
}

/// Working memory for the choice of a row.
struct Scratch<'a> {
    /// The logits, then the scores of a row, padded.
    scores: &'a mut [f32],
    /// What experts are chosen by, where that is not the score; padded.
    choice: &'a mut [f32],
    /// Scores of groups, padded.
    groups: &'a mut [f32],
    /// The best groups.
    kept: &'a mut [i32],
}

/// The choice of one row of so many experts, whose logits are in `scratch.scores`.
struct Row<'a, 'b> {
    router: &'a Router,
    bias: Option<&'a [f32]>,
    experts: usize,
    scratch: &'a mut Scratch<'b>,
    ids: &'a mut [i32],
    weights: &'a mut [f32],
}

impl Kernel for Row<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let scores = &mut *self.scratch.scores;
        match self.router.score {
            Score::Softmax => {
                softmax(simd, scores, self.experts);
                self.by_score(simd);
            }
            Score::Sigmoid => {
                for i in (0..scores.len()).step_by(S::LANES) {
                    let at = scores[i..].as_mut_ptr();
                    // SAFETY: a padded row is whole vectors.
                    unsafe { simd.store(at, sigmoid(simd, simd.load(at))) };
                }
                self.by_score(simd);
            }
            Score::SoftmaxOverChosen => {
                top(simd, scores, self.ids);
                self.weigh_chosen();
                let chosen = &mut self.scratch.choice[..padded(self.weights.len())];
                chosen.fill(f32::NAN);
                chosen[..self.weights.len()].copy_from_slice(self.weights);
                softmax(simd, chosen, self.weights.len());
                self.weights.copy_from_slice(&chosen[..self.weights.len()]);
            }
            Score::SparseMixer { epsilon } => self.sparse_mixer(simd, epsilon),
        }
        self.weights.iter_mut().for_each(|w| *w *= self.router.scale);
    }
}

impl Row<'_, '_> {
    /// `weights = scores[ids]`
    #[inline(always)]
    fn weigh_chosen(&mut self) {
        for (w, &id) in self.weights.iter_mut().zip(&*self.ids) {
            *w = self.scratch.scores[id as usize];
        }
    }

    /// Top-k of score plus bias, weighted by the score alone.
    #[inline(always)]
    fn by_score<S: Simd>(&mut self, simd: S) {
        if self.bias.is_none() && self.router.groups.is_none() {
            top(simd, self.scratch.scores, self.ids);
        } else {
            let choice = &mut *self.scratch.choice;
            choice.copy_from_slice(self.scratch.scores);
            if let Some(bias) = self.bias {
                choice.iter_mut().zip(bias).for_each(|(c, bias)| *c += bias);
            }
            if let Some(groups) = self.router.groups {
                self.keep_groups(simd, groups);
            }
            top(simd, self.scratch.choice, self.ids);
        }
        self.weigh_chosen();
        if let Renormalize::Sum { eps } = self.router.renormalize {
            let sum: f32 = self.weights.iter().sum();
            self.weights.iter_mut().for_each(|w| *w /= sum + eps);
        }
    }

    /// Takes experts outside the best groups out of the choice.
    #[inline(always)]
    fn keep_groups<S: Simd>(&mut self, simd: S, groups: ExpertGroups) {
        let Scratch { scores, choice, groups: best, kept } = &mut *self.scratch;
        let size = self.experts / groups.count;
        let outside = match groups.score {
            GroupScore::Max => 0.0,
            GroupScore::Top2Sum => f32::NEG_INFINITY,
        };
        for (g, best) in best[..groups.count].iter_mut().enumerate() {
            *best = match groups.score {
                GroupScore::Max => best_of(&scores[g * size..][..size]),
                GroupScore::Top2Sum => best_two(&choice[g * size..][..size]),
            };
        }
        let kept = &mut kept[..groups.keep];
        top(simd, best, kept);
        for g in (0..groups.count).filter(|&g| !kept.contains(&(g as i32))) {
            choice[g * size..][..size].fill(outside);
        }
    }

    /// One round per choice: the best logit left, weighted by the softmax over those left within `2 * epsilon` of
    /// it, relative to `max(|logit|, best)`.
    #[inline(always)]
    fn sparse_mixer<S: Simd>(&mut self, simd: S, epsilon: f32) {
        let Scratch { scores: logits, choice: near, .. } = &mut *self.scratch;
        for (id, weight) in self.ids.iter_mut().zip(&mut *self.weights) {
            top(simd, logits, std::slice::from_mut(id));
            let expert = *id as usize;
            let max = logits[expert];
            // Logits chosen before are -inf here and stay so.
            for (near, &logit) in near.iter_mut().zip(&**logits) {
                let far = (max - logit) / logit.abs().max(max) > 2.0 * epsilon;
                *near = if far { f32::NEG_INFINITY } else { logit };
            }
            softmax(simd, near, self.experts);
            *weight = near[expert];
            logits[expert] = f32::NEG_INFINITY;
        }
    }
}

/// See [`crate::backend::Backend::route`].
pub(super) fn route(
    backend: &CpuBackend,
    logits: View<'_>,
    bias: Option<View<'_>>,
    router: &Router,
    ids: ViewMut<'_>,
    weights: ViewMut<'_>,
) -> Result<()> {
    check::route(&logits, bias.as_ref(), router, &ids, &weights);
    let logits = Rows::<f32>::new(logits);
    let bias = bias.map(|bias| Rows::<f32>::new(bias).row(0));
    let (ids, weights) = (RowsMut::<i32>::new(ids), RowsMut::<f32>::new(weights));
    let (experts, top_k) = (logits.cols(), ids.cols());
    let (wide, groups) = (padded(experts), router.groups.map_or(0, |groups| groups.count));
    let each = |scratch: &mut Scratch<'_>, range| {
        for i in range {
            scratch.scores[..experts].copy_from_slice(logits.row(i));
            // SAFETY: each row is written by one task.
            let (ids, weights) = unsafe { (ids.part(i, 0..top_k), weights.part(i, 0..top_k)) };
            backend.dispatch(Row { router, bias, experts, scratch, ids, weights });
        }
    };
    for_rows(backend, logits.rows(), wide * (top_k + 1) * CHOICE, &|range| {
        with_local_scratch::<f32, _>(2 * wide + padded(groups), |floats| {
            with_local_scratch::<i32, _>(groups, |kept| {
                floats.fill(f32::NAN);
                let (scores, rest) = floats.split_at_mut(wide);
                let (choice, groups) = rest.split_at_mut(wide);
                each(&mut Scratch { scores, choice, groups, kept }, range);
            });
        });
    });
    Ok(())
}

#[cfg(test)]
mod tests;
