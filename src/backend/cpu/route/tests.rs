//! Every choice and every weight, bit for bit, against the formula in plain loops.

use crate::backend::cpu::CpuBackend;
use crate::backend::cpu::simd::{Isa, Kernel, Simd, exp, sigmoid};
use crate::backend::{Backend, DType};
use crate::spec::{ExpertGroups, GroupScore, Renormalize, Router, Score};

/// A function of one number, in the bits of an instruction set.
struct One(Function, f32);

#[derive(Clone, Copy)]
enum Function {
    Exp,
    Sigmoid,
}

impl Kernel for One {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let x = simd.splat(self.1);
        simd.to_array(match self.0 {
            Function::Exp => exp(simd, x),
            Function::Sigmoid => sigmoid(simd, x),
        })[0]
    }
}

/// [`Backend::route`] of one row.
struct Plain<'a> {
    isa: Isa,
    router: &'a Router,
    bias: Option<&'a [f32]>,
}

impl Plain<'_> {
    fn call(&self, function: Function, x: f32) -> f32 {
        self.isa.dispatch(One(function, x))
    }

    fn softmax(&self, x: &[f32]) -> Vec<f32> {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps: Vec<f32> = x.iter().map(|x| self.call(Function::Exp, x - max)).collect();
        let sum: f32 = exps.iter().sum();
        exps.iter().map(|e| e / sum).collect()
    }

    fn choose(&self, logits: &[f32], top_k: usize) -> (Vec<usize>, Vec<f32>) {
        let (ids, mut weights) = match self.router.score {
            Score::Softmax => self.by_score(&self.softmax(logits), top_k),
            Score::Sigmoid => {
                let scores: Vec<_> = logits.iter().map(|&l| self.call(Function::Sigmoid, l)).collect();
                self.by_score(&scores, top_k)
            }
            Score::SoftmaxOverChosen => {
                let ids = top(logits, top_k);
                let weights = self.softmax(&ids.iter().map(|&id| logits[id]).collect::<Vec<_>>());
                (ids, weights)
            }
            Score::SparseMixer { epsilon } => self.sparse_mixer(logits.to_vec(), epsilon, top_k),
        };
        weights.iter_mut().for_each(|w| *w *= self.router.scale);
        (ids, weights)
    }

    fn by_score(&self, s: &[f32], top_k: usize) -> (Vec<usize>, Vec<f32>) {
        let mut c = s.to_vec();
        if let Some(bias) = self.bias {
            c.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
        }
        if let Some(ExpertGroups { count, keep, score }) = self.router.groups {
            let size = c.len() / count;
            let (scored, outside) = match score {
                GroupScore::Max => (s, 0.0),
                GroupScore::Top2Sum => (&c[..], f32::NEG_INFINITY),
            };
            let best = |group: &[f32]| match score {
                GroupScore::Max => group.iter().copied().fold(f32::NEG_INFINITY, f32::max),
                GroupScore::Top2Sum => top(group, size.min(2)).into_iter().map(|i| group[i]).sum(),
            };
            let kept = top(&scored.chunks(size).map(best).collect::<Vec<_>>(), keep);
            for (expert, c) in c.iter_mut().enumerate() {
                if !kept.contains(&(expert / size)) {
                    *c = outside;
                }
            }
        }
        let ids = top(&c, top_k);
        let mut weights: Vec<f32> = ids.iter().map(|&id| s[id]).collect();
        if let Renormalize::Sum { eps } = self.router.renormalize {
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= sum + eps);
        }
        (ids, weights)
    }

    fn sparse_mixer(&self, mut logits: Vec<f32>, epsilon: f32, top_k: usize) -> (Vec<usize>, Vec<f32>) {
        let round = |_| {
            let id = top(&logits, 1)[0];
            let max = logits[id];
            let far = |l: f32| (max - l) / l.abs().max(max) > 2.0 * epsilon;
            let near: Vec<_> = logits.iter().map(|&l| if far(l) { f32::NEG_INFINITY } else { l }).collect();
            logits[id] = f32::NEG_INFINITY;
            (id, self.softmax(&near)[id])
        };
        (0..top_k).map(round).unzip()
    }
}

/// The largest, best first: each value moves in front of those it is greater than, so that equal ones stay in order, and NaN where
/// it came.
fn top(values: &[f32], k: usize) -> Vec<usize> {
    let mut best: Vec<usize> = Vec::new();
    for (i, &value) in values.iter().enumerate() {
        let smaller = best.iter().rev().take_while(|&&b| value > values[b]).count();
        best.insert(best.len() - smaller, i);
        best.truncate(k);
    }
    best
}

/// Uniform in -4..4; a function of its arguments alone.
fn random(stream: usize, index: usize) -> f32 {
    let mut x = (stream as u64) << 32 | index as u64;
    for _ in 0..3 {
        x = (x ^ (x >> 29)).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    (x >> 40) as f32 / (1u64 << 21) as f32 - 4.0
}

/// Rows of logits: different ones, many equal ones, all equal ones, and those in which one or another number is none or not finite.
fn rows(experts: usize) -> Vec<Vec<f32>> {
    let row = |r: usize| -> Vec<f32> { (0..experts).map(|i| random(r, i)).collect() };
    let mut rows: Vec<_> = (0..8).map(row).collect();
    rows.extend((8..12).map(|r| row(r).into_iter().map(f32::round).collect()));
    rows.extend([0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(|x| vec![x; experts]));
    for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 200.0, -200.0] {
        for every in [2, 3, 7, experts] {
            for first in [0, 1, every / 2, every - 1] {
                let mut row = row(rows.len());
                row.iter_mut().skip(first).step_by(every).for_each(|x| *x = special);
                rows.push(row);
            }
        }
    }
    rows
}

/// Compares a router with its formula on every instruction set.
fn check(router: &Router, experts: usize, top_k: usize) {
    let rows = rows(experts);
    let bias: Vec<f32> = (0..experts).map(|i| random(1000, i / 2) * 0.1).collect();
    let bias = router.choice_bias.then_some(&bias[..]);
    for isa in Isa::available() {
        let b = CpuBackend::new(2, isa).unwrap();
        let mut logits = b.alloc(DType::F32, rows.len(), experts).unwrap();
        b.upload(bytemuck::cast_slice(&rows.concat()), logits.view_mut()).unwrap();
        let bias_tensor = bias.map(|bias| {
            let mut tensor = b.alloc(DType::F32, 1, experts).unwrap();
            b.upload(bytemuck::cast_slice(bias), tensor.view_mut()).unwrap();
            tensor
        });
        let mut ids = b.alloc(DType::I32, rows.len(), top_k).unwrap();
        let mut weights = b.alloc(DType::F32, rows.len(), top_k).unwrap();
        let bias_view = bias_tensor.as_ref().map(|t| t.view());
        b.route(logits.view(), bias_view, router, ids.view_mut(), weights.view_mut()).unwrap();
        let (mut got_ids, mut got_weights) = (vec![0i32; rows.len() * top_k], vec![0f32; rows.len() * top_k]);
        b.download(ids.view(), bytemuck::cast_slice_mut(&mut got_ids)).unwrap();
        b.download(weights.view(), bytemuck::cast_slice_mut(&mut got_weights)).unwrap();
        let got = got_ids.chunks(top_k).zip(got_weights.chunks(top_k));
        for (r, (row, (got_ids, got_weights))) in rows.iter().zip(got).enumerate() {
            let (ids, weights) = Plain { isa, router, bias }.choose(row, top_k);
            let what =
                || format!("{}, {experts} experts, top {top_k}, {router:?}, row {r}: {row:?}", isa.name());
            assert!(got_ids.iter().map(|&id| id as usize).eq(ids.iter().copied()), "{} {got_ids:?}", what());
            // Which NaN it is depends on the compiler's order of operands.
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            assert!(got_weights.iter().zip(&weights).all(same), "{} {got_weights:?}", what());
        }
    }
}

#[test]
fn every_choice_is_that_of_the_formula() {
    let scores =
        [Score::Softmax, Score::Sigmoid, Score::SoftmaxOverChosen, Score::SparseMixer { epsilon: 0.01 }];
    for (experts, top_ks) in [
        (1, &[1][..]),
        (8, &[1, 2, 8]),
        (16, &[2, 16]),
        (60, &[4]),
        (64, &[8]),
        (160, &[6]),
        (512, &[10, 80]),
    ] {
        for &top_k in top_ks {
            for score in scores {
                let by_score = matches!(score, Score::Softmax | Score::Sigmoid);
                for choice_bias in [false, true].into_iter().take(1 + usize::from(by_score)) {
                    let renormalize =
                        if choice_bias { Renormalize::Off } else { Renormalize::Sum { eps: 1e-20 } };
                    let router = Router {
                        score,
                        logit_bias: false,
                        choice_bias,
                        groups: None,
                        renormalize,
                        scale: 2.5,
                    };
                    check(&router, experts, top_k);
                }
            }
        }
    }
}

#[test]
fn every_choice_within_groups_is_that_of_the_formula() {
    for (experts, count, keep, top_k) in [
        (8, 8, 3, 2),
        (8, 1, 1, 8),
        (24, 6, 3, 6),
        (64, 8, 4, 6),
        (160, 8, 3, 6),
        (256, 8, 4, 8),
        (512, 32, 20, 10),
    ] {
        for (score, group_score, choice_bias) in [
            (Score::Softmax, GroupScore::Max, false),
            (Score::Sigmoid, GroupScore::Top2Sum, true),
            (Score::Sigmoid, GroupScore::Top2Sum, false),
        ] {
            let groups = Some(ExpertGroups { count, keep, score: group_score });
            let renormalize = Renormalize::Sum { eps: 0.0 };
            let router = Router { score, logit_bias: false, choice_bias, groups, renormalize, scale: 16.0 };
            check(&router, experts, top_k);
        }
    }
}
