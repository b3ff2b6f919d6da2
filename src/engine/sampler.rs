//! From one row of logits to the next token. Pure: the same row, parameters and position give the same token in any
//! batch and on any rank.
//!
//! Order of the steps: temperature, top_k, top_p, draw. One tie-break everywhere: a higher logit is better, then a
//! lower id; so temperature 0, top_k 1 and a tiny top_p choose the same token. Nothing sorts the whole vocabulary: the
//! best tokens are selected (quickselect, O(vocab)) and only those are sorted.

use super::plan::{RowJob, RowResult, Sampled};
use super::request::Sampling;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::cmp::Ordering;

/// A row that no token can be chosen from.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "the model produced {count} non-finite logits of {vocab} at position {position}, the first for token {token}"
)]
pub struct NonFinite {
    /// NaNs and infinities in the row.
    pub count: usize,
    /// Length of the row.
    pub vocab: usize,
    /// The first token with one.
    pub token: usize,
    /// Position that was to be sampled.
    pub position: u32,
}

/// Chooses tokens; holds only scratch memory.
#[derive(Debug, Default)]
pub struct Sampler {
    /// Token ids, partly sorted best first.
    ids: Vec<u32>,
}

impl Sampler {
    /// Does one job on its row `[vocab]`.
    pub fn run(&mut self, index: u32, job: &RowJob, logits: &[f32]) -> RowResult {
        let outcome = match check_finite(logits, job.position) {
            Err(error) => Err(error.to_string()),
            Ok(()) if job.sample => {
                Ok(Some(self.sample(logits, &job.request.sampling, job.position, job.request.logprobs)))
            }
            Ok(()) => Ok(None),
        };
        RowResult { job: index, outcome, logits: job.capture.then(|| logits.to_vec()) }
    }

    /// Chooses the token at `position` from finite `logits` and reports the log-probabilities asked for.
    pub fn sample(
        &mut self,
        logits: &[f32],
        sampling: &Sampling,
        position: u32,
        logprobs: Option<usize>,
    ) -> Sampled {
        let best = argmax(logits);
        let token = if sampling.temperature == 0.0 {
            best
        } else {
            self.draw(logits, sampling, logits[best as usize], uniform(sampling.seed, position))
        };
        let Some(n) = logprobs else {
            return Sampled { token, logprob: None, top: Vec::new() };
        };
        let normalizer = log_sum_exp(logits, logits[best as usize]);
        let logprob = |id: u32| (f64::from(logits[id as usize]) - normalizer) as f32;
        let top = self.best(logits, n).iter().map(|&id| (id, logprob(id))).collect();
        Sampled { token, logprob: Some(logprob(token)), top }
    }

    /// Inverse-transform sampling with `u` in [0, 1). `max` is the highest logit.
    fn draw(&mut self, logits: &[f32], sampling: &Sampling, max: f32, u: f64) -> u32 {
        let temperature = f64::from(sampling.temperature);
        let weight = |id: u32| ((f64::from(logits[id as usize]) - f64::from(max)) / temperature).exp();
        let vocab = logits.len();
        let limited = sampling.top_k > 0 && sampling.top_k < vocab;
        if !limited && sampling.top_p >= 1.0 {
            let all = 0..vocab as u32;
            let mass: f64 = all.clone().map(weight).sum();
            return pick(all, weight, u * mass);
        }
        if limited {
            self.best(logits, sampling.top_k);
        } else {
            self.refill(vocab);
        }
        if sampling.top_p < 1.0 {
            // Without top_k the ids are still in ascending order here, with it they are sorted: a fixed order of summation.
            let mass: f64 = self.ids.iter().copied().map(weight).sum();
            let kept = nucleus(&mut self.ids, logits, weight, f64::from(sampling.top_p) * mass);
            self.ids.truncate(kept);
        }
        let mass: f64 = self.ids.iter().copied().map(weight).sum();
        pick(self.ids.iter().copied(), weight, u * mass)
    }

    /// The `n` best tokens, best first.
    fn best(&mut self, logits: &[f32], n: usize) -> &[u32] {
        self.refill(logits.len());
        let n = n.min(logits.len());
        sort_best(&mut self.ids, 0, n, logits);
        self.ids.truncate(n);
        &self.ids
    }

    fn refill(&mut self, vocab: usize) {
        self.ids.clear();
        self.ids.extend(0..vocab as u32);
    }
}

/// Refuses NaNs and infinities.
fn check_finite(logits: &[f32], position: u32) -> Result<(), NonFinite> {
    // Counting all of them, rather than stopping at the first, keeps the usual pass free of branches.
    let count = logits.iter().filter(|x| !x.is_finite()).count();
    if count == 0 {
        return Ok(());
    }
    let token = logits.iter().position(|x| !x.is_finite()).expect("one was counted");
    Err(NonFinite { count, vocab: logits.len(), token, position })
}

/// The token with the highest logit, the lowest id among equals.
fn argmax(logits: &[f32]) -> u32 {
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
    logits.iter().position(|&logit| logit == max).expect("a row of finite logits has a maximum") as u32
}

/// Best first: higher logit, then lower id.
fn order(logits: &[f32], a: u32, b: u32) -> Ordering {
    let by_logit = logits[b as usize].partial_cmp(&logits[a as usize]);
    by_logit.expect("logits are finite").then(a.cmp(&b))
}

/// Puts the tokens of ranks `from..to` in their sorted places, given that `ids[..from]` already is.
fn sort_best(ids: &mut [u32], from: usize, to: usize, logits: &[f32]) {
    if from < to && to < ids.len() {
        ids[from..].select_nth_unstable_by(to - from - 1, |&a, &b| order(logits, a, b));
    }
    ids[from..to].sort_unstable_by(|&a, &b| order(logits, a, b));
}

/// How many of the best tokens it takes to reach `mass`, at least one; sorts them to the front of `ids`. Sorted runs grow
/// eightfold, so a narrow distribution never sorts more than a few dozen tokens.
fn nucleus(ids: &mut [u32], logits: &[f32], weight: impl Fn(u32) -> f64, mass: f64) -> usize {
    let mut sorted = 0;
    let mut sum = 0.0;
    while sorted < ids.len() {
        let end = (sorted * 8).max(64).min(ids.len());
        sort_best(ids, sorted, end, logits);
        for (i, &id) in ids.iter().enumerate().take(end).skip(sorted) {
            sum += weight(id);
            if sum >= mass {
                return i + 1;
            }
        }
        sorted = end;
    }
    ids.len()
}

/// The first token whose running sum of weights exceeds `target`.
fn pick(ids: impl Iterator<Item = u32>, weight: impl Fn(u32) -> f64, target: f64) -> u32 {
    let mut sum = 0.0;
    let mut last = None;
    for id in ids {
        let w = weight(id);
        sum += w;
        if sum > target {
            return id;
        }
        if w > 0.0 {
            last = Some(id);
        }
    }
    // Rounding can make the target equal the whole sum.
    last.expect("the best token has weight 1")
}

/// ln(sum(exp(logit))), summed in id order.
fn log_sum_exp(logits: &[f32], max: f32) -> f64 {
    let max = f64::from(max);
    max + logits.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
}

/// A number in [0, 1) that depends on seed and position only: 53 bits of ChaCha8 keyed by both.
fn uniform(seed: u64, position: u32) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..12].copy_from_slice(&position.to_le_bytes());
    (ChaCha8Rng::from_seed(key).next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sampling(temperature: f32, top_k: usize, top_p: f32, seed: u64) -> Sampling {
        Sampling { temperature, top_p, top_k, seed }
    }

    /// The same rules by a full sort: (token, weight) of all kept tokens, best first.
    fn kept_slowly(logits: &[f32], s: &Sampling) -> Vec<(u32, f64)> {
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        ids.sort_by(|&a, &b| order(logits, a, b));
        if s.top_k > 0 {
            ids.truncate(s.top_k);
        }
        let max = f64::from(logits[ids[0] as usize]);
        let weight = |id: u32| ((f64::from(logits[id as usize]) - max) / f64::from(s.temperature)).exp();
        let mass: f64 = ids.iter().map(|&id| weight(id)).sum();
        let mut sum = 0.0;
        let mut kept = Vec::new();
        for id in ids {
            kept.push((id, weight(id)));
            sum += weight(id);
            if sum >= f64::from(s.top_p) * mass {
                break;
            }
        }
        kept
    }

    fn logit_rows() -> impl Strategy<Value = Vec<f32>> {
        // Few distinct values, so that ties are common; long enough to leave the first sorted run.
        prop_oneof![
            proptest::collection::vec((-20i32..20).prop_map(|x| x as f32 / 4.0), 1..300),
            proptest::collection::vec(-30f32..30.0, 1..2000),
        ]
    }

    proptest! {
        #[test]
        fn greedy_top_k_1_and_tiny_top_p_agree(logits in logit_rows(), seed: u64, t in 0.01f32..100.0) {
            let mut sampler = Sampler::default();
            let mut token = |s| sampler.sample(&logits, &s, 3, None).token;
            let greedy = token(Sampling::GREEDY);
            prop_assert_eq!(token(sampling(t, 1, 1.0, seed)), greedy);
            prop_assert_eq!(token(sampling(t, 0, 1e-30, seed)), greedy);
            prop_assert_eq!(token(sampling(t, 7, f32::MIN_POSITIVE, seed)), greedy);
            let first_best = (0..logits.len()).find(|&i| logits.iter().all(|&x| x <= logits[i])).unwrap();
            prop_assert_eq!(greedy as usize, first_best);
        }

        #[test]
        fn only_kept_tokens_are_drawn(
            logits in logit_rows(), seed: u64, t in 0.1f32..10.0, k in 0usize..200, p in 0.01f32..1.0,
        ) {
            let s = sampling(t, k, p, seed);
            let kept = kept_slowly(&logits, &s);
            let mut sampler = Sampler::default();
            for position in 0..20 {
                let token = sampler.sample(&logits, &s, position, None).token;
                prop_assert!(kept.iter().any(|&(id, _)| id == token));
            }
        }

        #[test]
        fn top_logprobs_are_the_best_of_a_softmax(logits in logit_rows(), n in 0usize..30, seed: u64) {
            let s = sampling(1.0, 0, 1.0, seed);
            let sampled = Sampler::default().sample(&logits, &s, 0, Some(n));
            let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
            ids.sort_by(|&a, &b| order(&logits, a, b));
            ids.truncate(n);
            prop_assert_eq!(sampled.top.iter().map(|t| t.0).collect::<Vec<_>>(), ids);
            let z: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            for &(id, logprob) in sampled.top.iter().chain([&(sampled.token, sampled.logprob.unwrap())]) {
                let expected = f64::from(logits[id as usize]) - z.ln();
                prop_assert!((f64::from(logprob) - expected).abs() < 1e-4, "{} {}", logprob, expected);
            }
        }

        #[test]
        fn extreme_parameters_still_give_a_token(logits in logit_rows(), seed: u64) {
            for t in [f32::MIN_POSITIVE / 4.0, 1e-30, 1e30, f32::MAX] {
                for (k, p) in [(0, 1.0), (0, 0.999_999), (usize::MAX, 0.5), (2, 1.0)] {
                    let token = Sampler::default().sample(&logits, &sampling(t, k, p, seed), u32::MAX, Some(usize::MAX));
                    prop_assert!((token.token as usize) < logits.len());
                }
            }
        }
    }

    /// Frequencies over seeds follow the softmax: a chi-square test whose seeds are fixed, so it cannot flake.
    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.0f32, 1.0, 2.0, -1.0, 0.5, 2.0];
        for s in [sampling(0.7, 0, 1.0, 0), sampling(1.3, 4, 1.0, 0), sampling(1.0, 0, 0.8, 0)] {
            let kept = kept_slowly(&logits, &s);
            let mass: f64 = kept.iter().map(|k| k.1).sum();
            let draws = 20_000;
            let mut counts = [0u32; 6];
            let mut sampler = Sampler::default();
            for seed in 0..draws {
                let token =
                    sampler.sample(&logits, &Sampling { seed, ..s.clone() }, seed as u32 % 7, None).token;
                counts[token as usize] += 1;
            }
            let chi2: f64 = kept
                .iter()
                .map(|&(id, w)| {
                    let expected = w / mass * draws as f64;
                    (f64::from(counts[id as usize]) - expected).powi(2) / expected
                })
                .sum();
            // 99.9 % quantile of chi-square with 5 degrees of freedom: 20.5.
            assert!(chi2 < 20.5, "{s:?}: {counts:?} chi2 {chi2}");
        }
    }

    /// The generator is part of what users rely on: the same seed gives the same text in every release. Under the zero key
    /// ChaCha8 starts with the bytes 3e 00 ef 2f 89 5f 40 d6 (draft-strombergson-chacha-test-vectors, TC1).
    #[test]
    fn the_generator_is_pinned() {
        let first = u64::from_le_bytes([0x3e, 0x00, 0xef, 0x2f, 0x89, 0x5f, 0x40, 0xd6]);
        assert_eq!(uniform(0, 0), (first >> 11) as f64 / 2f64.powi(53));
        assert_eq!(uniform(42, 7), 0.424_899_019_997_450_6);
        assert_ne!(uniform(0, 1), uniform(1, 0));
    }

    #[test]
    fn non_finite_rows_are_refused_with_their_numbers() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = check_finite(&[0.0, bad, 1.0, bad], 5).unwrap_err();
            assert_eq!(error, NonFinite { count: 2, vocab: 4, token: 1, position: 5 });
        }
        assert!(check_finite(&[-0.0, f32::MAX], 0).is_ok());
    }

    /// Both zeros are the same logit.
    #[test]
    fn zeros_of_either_sign_tie() {
        let logits = [-1.0, -0.0, 0.0];
        let mut sampler = Sampler::default();
        assert_eq!(sampler.sample(&logits, &Sampling::GREEDY, 0, None).token, 1);
        assert_eq!(sampler.sample(&logits, &sampling(1.0, 1, 1.0, 9), 0, None).token, 1);
    }
}
