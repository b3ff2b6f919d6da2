//! The token-to-expert router.

use super::CpuBackend;
use super::memory::{Rows, RowsMut, with_local_scratch};
use super::rows::{for_rows, load_next, store_next};
use super::simd::{Kernel, Simd, exp, sigmoid};
use crate::backend::{View, ViewMut, check};
use crate::error::Result;
use crate::spec::{ExpertGroups, GroupScore, Renormalize, Router, Score};

/// Looking whether a score is among the best takes as long as streaming so many elements.
const CHOICE: usize = 8;

/// `x = e^(x - max) / sum`, in place.
struct Softmax<'a>(&'a mut [f32]);

impl Kernel for Softmax<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (x, len) = (self.0.as_mut_ptr(), self.0.len());
        let max = self.0.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for i in (0..len).step_by(S::LANES) {
            let n = (len - i).min(S::LANES);
            // SAFETY: `n` elements from `i` on are in the slice.
            unsafe {
                let v = simd.sub(load_next(simd, x.add(i), n), simd.splat(max));
                store_next(simd, x.add(i), n, exp(simd, v));
            }
        }
        let sum: f32 = self.0.iter().sum();
        self.0.iter_mut().for_each(|e| *e /= sum);
    }
}

/// `x = 1 / (1 + e^-x)`, in place.
struct Sigmoid<'a>(&'a mut [f32]);

impl Kernel for Sigmoid<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (x, len) = (self.0.as_mut_ptr(), self.0.len());
        for i in (0..len).step_by(S::LANES) {
            let n = (len - i).min(S::LANES);
            // SAFETY: `n` elements from `i` on are in the slice.
            unsafe { store_next(simd, x.add(i), n, sigmoid(simd, load_next(simd, x.add(i), n))) };
        }
    }
}

/// Fills `chosen` with the indices of the largest values, best first; ties go to the lowest index.
fn top(values: &[f32], chosen: &mut [i32]) {
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

/// Takes experts outside the best groups out of the choice `c`; `s` are the scores without bias.
fn keep_groups(c: &mut [f32], s: &[f32], groups: ExpertGroups) {
    let size = c.len() / groups.count;
    let outside = match groups.score {
        GroupScore::Max => 0.0,
        GroupScore::Top2Sum => f32::NEG_INFINITY,
    };
    with_local_scratch::<f32, _>(groups.count, |scores| {
        for (g, score) in scores.iter_mut().enumerate() {
            *score = match groups.score {
                GroupScore::Max => s[g * size..][..size].iter().copied().fold(f32::NEG_INFINITY, f32::max),
                GroupScore::Top2Sum => best_two(&c[g * size..][..size]),
            };
        }
        with_local_scratch::<i32, _>(groups.keep, |kept| {
            top(scores, kept);
            for g in (0..groups.count).filter(|&g| !kept.contains(&(g as i32))) {
                c[g * size..][..size].fill(outside);
            }
        });
    });
}

/// Sum of the two largest values; of the only one, where there is one.
fn best_two(values: &[f32]) -> f32 {
    let mut best = [0, 0];
    let best = &mut best[..values.len().min(2)];
    top(values, best);
    best.iter().map(|&i| values[i as usize]).sum()
}

/// The choice of one row. `scores` holds the logits and is overwritten.
struct Row<'a> {
    router: &'a Router,
    bias: Option<&'a [f32]>,
    scores: &'a mut [f32],
    ids: &'a mut [i32],
    weights: &'a mut [f32],
}

impl Row<'_> {
    fn choose(mut self, backend: &CpuBackend) {
        match self.router.score {
            Score::Softmax => {
                backend.dispatch(Softmax(self.scores));
                self.by_score();
            }
            Score::Sigmoid => {
                backend.dispatch(Sigmoid(self.scores));
                self.by_score();
            }
            Score::SoftmaxOverChosen => {
                top(self.scores, self.ids);
                self.weigh_chosen();
                backend.dispatch(Softmax(self.weights));
            }
            Score::SparseMixer { epsilon } => self.sparse_mixer(backend, epsilon),
        }
        self.weights.iter_mut().for_each(|w| *w *= self.router.scale);
    }

    /// `weights = scores[ids]`
    fn weigh_chosen(&mut self) {
        for (w, &id) in self.weights.iter_mut().zip(&*self.ids) {
            *w = self.scores[id as usize];
        }
    }

    /// Top-k of score plus bias, weighted by the score alone.
    fn by_score(&mut self) {
        if self.bias.is_none() && self.router.groups.is_none() {
            top(self.scores, self.ids);
        } else {
            with_local_scratch::<f32, _>(self.scores.len(), |c| {
                c.copy_from_slice(self.scores);
                for (c, bias) in c.iter_mut().zip(self.bias.into_iter().flatten()) {
                    *c += bias;
                }
                if let Some(groups) = self.router.groups {
                    keep_groups(c, self.scores, groups);
                }
                top(c, self.ids);
            });
        }
        self.weigh_chosen();
        if let Renormalize::Sum { eps } = self.router.renormalize {
            let sum: f32 = self.weights.iter().sum();
            self.weights.iter_mut().for_each(|w| *w /= sum + eps);
        }
    }

    /// One round per choice: the best logit left, weighted by the softmax over those left within `2 * epsilon` of
    /// it, relative to `max(|logit|, best)`.
    fn sparse_mixer(&mut self, backend: &CpuBackend, epsilon: f32) {
        with_local_scratch::<f32, _>(self.scores.len(), |near| {
            for (id, weight) in self.ids.iter_mut().zip(&mut *self.weights) {
                let mut best = [0];
                top(self.scores, &mut best);
                let expert = best[0] as usize;
                let max = self.scores[expert];
                // Logits chosen before are -inf here and stay so.
                for (near, &logit) in near.iter_mut().zip(&*self.scores) {
                    let far = (max - logit) / logit.abs().max(max) > 2.0 * epsilon;
                    *near = if far { f32::NEG_INFINITY } else { logit };
                }
                backend.dispatch(Softmax(near));
                (*id, *weight) = (best[0], near[expert]);
                self.scores[expert] = f32::NEG_INFINITY;
            }
        });
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
    let top_k = ids.cols();
    for_rows(backend, logits.rows(), logits.cols() * (top_k + 1) * CHOICE, &|range| {
        with_local_scratch::<f32, _>(logits.cols(), |scores| {
            for i in range {
                scores.copy_from_slice(logits.row(i));
                // SAFETY: each row is written by one task.
                let (ids, weights) = unsafe { (ids.part(i, 0..top_k), weights.part(i, 0..top_k)) };
                Row { router, bias, scores, ids, weights }.choose(backend);
            }
        });
    });
    Ok(())
}
