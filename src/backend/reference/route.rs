//! The token-to-expert router: which experts, with which weights.

use super::dense::sigmoid;
use crate::spec::{ExpertGroups, GroupScore, Renormalize, Router, Score};

/// One chosen expert.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Choice {
    pub(super) expert: usize,
    pub(super) weight: f32,
}

/// The `top_k` experts of one row, best first; see [`crate::backend::Backend::route`].
pub(super) fn choose(logits: &[f32], bias: Option<&[f32]>, router: &Router, top_k: usize) -> Vec<Choice> {
    let mut chosen = match router.score {
        Score::Softmax => by_score(&softmax(logits), bias, router.groups, top_k),
        Score::Sigmoid => {
            let scores: Vec<f32> = logits.iter().map(|&l| sigmoid(l)).collect();
            by_score(&scores, bias, router.groups, top_k)
        }
        Score::SoftmaxOverChosen => {
            let experts = top(logits, top_k);
            let weights = softmax(&experts.iter().map(|&e| logits[e]).collect::<Vec<_>>());
            experts.into_iter().zip(weights).map(|(expert, weight)| Choice { expert, weight }).collect()
        }
        Score::SparseMixer { epsilon } => sparse_mixer(logits, epsilon, top_k),
    };
    let weighted_once = matches!(router.score, Score::SoftmaxOverChosen | Score::SparseMixer { .. });
    if let Renormalize::Sum { eps } = router.renormalize
        && !weighted_once
    {
        let sum: f32 = chosen.iter().map(|c| c.weight).sum();
        chosen.iter_mut().for_each(|c| c.weight /= sum + eps);
    }
    chosen.iter_mut().for_each(|c| c.weight *= router.scale);
    chosen
}

/// Top-k of score plus bias, weighted by the score alone.
fn by_score(s: &[f32], bias: Option<&[f32]>, groups: Option<ExpertGroups>, top_k: usize) -> Vec<Choice> {
    let mut c: Vec<f32> = (0..s.len()).map(|e| s[e] + bias.map_or(0.0, |b| b[e])).collect();
    if let Some(groups) = groups {
        keep_groups(&mut c, s, groups);
    }
    top(&c, top_k).into_iter().map(|expert| Choice { expert, weight: s[expert] }).collect()
}

/// Takes experts outside the best groups out of the choice `c`.
fn keep_groups(c: &mut [f32], s: &[f32], groups: ExpertGroups) {
    let size = c.len() / groups.count;
    let group_scores: Vec<f32> = (0..groups.count)
        .map(|g| match groups.score {
            GroupScore::Max => s[g * size..][..size].iter().copied().fold(f32::NEG_INFINITY, f32::max),
            GroupScore::Top2Sum => {
                let group = &c[g * size..][..size];
                top(group, size.min(2)).into_iter().map(|e| group[e]).sum()
            }
        })
        .collect();
    let kept = top(&group_scores, groups.keep);
    let outside = match groups.score {
        GroupScore::Max => 0.0,
        GroupScore::Top2Sum => f32::NEG_INFINITY,
    };
    for g in (0..groups.count).filter(|g| !kept.contains(g)) {
        c[g * size..][..size].fill(outside);
    }
}

/// Phi-3.5-MoE's sparsemixer as transformers evaluates it, one round per choice: the best logit not chosen yet,
/// weighted by the softmax over the logits within `2 * epsilon` of it, relative to `max(|logit|, best)`.
fn sparse_mixer(logits: &[f32], epsilon: f32, top_k: usize) -> Vec<Choice> {
    let mut left = logits.to_vec();
    let mut chosen = Vec::new();
    for _ in 0..top_k {
        let expert = top(&left, 1)[0];
        let max = left[expert];
        let near: Vec<f32> = left
            .iter()
            .zip(logits)
            .map(|(&l, &logit)| {
                let far = (max - logit) / logit.abs().max(max) > 2.0 * epsilon;
                if far { f32::NEG_INFINITY } else { l }
            })
            .collect();
        chosen.push(Choice { expert, weight: softmax(&near)[expert] });
        left[expert] = f32::NEG_INFINITY;
    }
    chosen
}

/// `e^(x - max) / sum`.
fn softmax(x: &[f32]) -> Vec<f32> {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f64> = x.iter().map(|&x| f64::from(x - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| (e / sum) as f32).collect()
}

/// Indices of the `k` largest, best first; ties go to the lowest index.
fn top(x: &[f32], k: usize) -> Vec<usize> {
    let mut chosen = Vec::with_capacity(k);
    for _ in 0..k {
        let left = (0..x.len()).filter(|i| !chosen.contains(i));
        let best = left.reduce(|best, i| if x[i] > x[best] { i } else { best });
        chosen.push(best.expect("k does not exceed the length"));
    }
    chosen
}
