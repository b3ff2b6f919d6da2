//! From one row of logits to the next token. Pure: the same row, parameters and position give the same token in any
//! batch and on any rank.
//!
//! Order of the steps: temperature, top_k, top_p, draw. One tie-break everywhere: a higher logit is better, then a
//! lower id; so temperature 0, top_k 1 and a tiny top_p choose the same token. Nothing sorts the whole vocabulary: the
//! best tokens are selected in O(vocab) and only those are sorted. Nothing calls the system's `exp`, whose last bits
//! differ from machine to machine.

use super::plan::{RowJob, RowResult};
use super::request::{Sampling, TokenEvent};
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

/// Up to this many best tokens are found by insertion in one pass; more by quickselect.
const FEW: usize = 256;

/// Chooses tokens; holds only scratch memory.
#[derive(Debug, Default)]
pub struct Sampler {
    /// Token ids, best first.
    ids: Vec<u32>,
    /// exp((logit - max) / temperature) of every token.
    weights: Vec<f32>,
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
    ) -> TokenEvent {
        let best = argmax(logits);
        let max = logits[best as usize];
        let token = if sampling.temperature == 0.0 {
            best
        } else {
            self.weigh(logits, max, sampling.temperature);
            self.draw(logits, sampling, uniform(sampling.seed, position))
        };
        let Some(n) = logprobs else {
            return TokenEvent { token, logprob: None, top: Vec::new() };
        };
        self.weigh(logits, max, 1.0);
        let normalizer = f64::from(max) + self.mass().ln();
        let logprob = |id: u32| (f64::from(logits[id as usize]) - normalizer) as f32;
        self.select_best(logits, n);
        let top = self.ids.iter().map(|&id| (id, logprob(id))).collect();
        TokenEvent { token, logprob: Some(logprob(token)), top }
    }

    /// Draws from the weights, limited by top_k and top_p, with `u` in [0, 1). Walks the kept tokens in id order,
    /// whichever way they were found.
    fn draw(&mut self, logits: &[f32], sampling: &Sampling, u: f64) -> u32 {
        let vocab = logits.len();
        let top_p = f64::from(sampling.top_p);
        let limited = sampling.top_k > 0 && sampling.top_k < vocab;
        if !limited && top_p >= 1.0 {
            return pick(0..vocab as u32, &self.weights, u * self.mass());
        }
        let mass = if limited {
            self.select_best(logits, sampling.top_k);
            self.mass_of_ids()
        } else {
            let mass = self.mass();
            // Together, all tokens below this weigh less than what top_p leaves out; it is at most 1, the best's weight.
            self.select_above((1.0 - top_p) * mass / vocab as f64);
            mass
        };
        if top_p < 1.0 {
            let kept = nucleus(&mut self.ids, logits, &self.weights, top_p * mass);
            self.ids.truncate(kept);
        }
        self.ids.sort_unstable();
        pick(self.ids.iter().copied(), &self.weights, u * self.mass_of_ids())
    }

    /// Fills the weights of all tokens; the best has weight 1.
    fn weigh(&mut self, logits: &[f32], max: f32, temperature: f32) {
        self.weights.clear();
        self.weights.extend(logits.iter().map(|&logit| exp_nonpositive((logit - max) / temperature)));
    }

    /// Sum of all weights, in id order.
    fn mass(&self) -> f64 {
        self.weights.iter().copied().map(f64::from).sum()
    }

    /// Sum of the weights of the selected tokens, in the order they have.
    fn mass_of_ids(&self) -> f64 {
        self.ids.iter().map(|&id| f64::from(self.weights[id as usize])).sum()
    }

    /// Selects the tokens of at least this weight, in id order.
    fn select_above(&mut self, weight: f64) {
        let ids = (0u32..).zip(&self.weights).filter(|&(_, &w)| f64::from(w) >= weight).map(|(id, _)| id);
        self.ids.clear();
        self.ids.extend(ids);
    }

    /// Selects the `n` best tokens (all, when there are fewer), best first.
    fn select_best(&mut self, logits: &[f32], n: usize) {
        let ids = &mut self.ids;
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

/// Moves the smallest set of best tokens that reaches `mass` to the front of `ids`; returns its size, at least one.
/// Quickselect by weight: halves the candidates until few are left to sort, O(ids) in all.
fn nucleus(ids: &mut [u32], logits: &[f32], weights: &[f32], mass: f64) -> usize {
    let better = |&a: &u32, &b: &u32| order(logits, a, b);
    let weight = |&id: &u32| f64::from(weights[id as usize]);
    // Those before `start` are in; those from `end` on are out, unless rounding hides that the rest suffices.
    let (mut start, mut end, mut sum) = (0, ids.len(), 0.0);
    while end - start > 32 {
        let half = start + (end - start) / 2;
        ids[start..end].select_nth_unstable_by(half - start, better);
        let more: f64 = ids[start..half].iter().map(weight).sum();
        if sum + more >= mass {
            end = half;
        } else {
            (start, sum) = (half, sum + more);
        }
    }
    ids[start..end].sort_unstable_by(better);
    let last = ids[start..end].iter().position(|id| {
        sum += weight(id);
        sum >= mass
    });
    last.map_or(end, |last| start + last + 1)
}

/// The first token whose running sum of weights exceeds `target`.
fn pick(ids: impl Iterator<Item = u32>, weights: &[f32], target: f64) -> u32 {
    let mut sum = 0.0;
    let mut last = None;
    for id in ids {
        let weight = weights[id as usize];
        sum += f64::from(weight);
        if sum > target {
            return id;
        }
        if weight > 0.0 {
            last = Some(id);
        }
    }
    // Rounding can make the target equal the whole sum.
    last.expect("the best token has weight 1")
}

/// exp(x) for x <= 0, to about 2 ulp; 0 where the result would be denormal. Plain multiplications and additions in a
/// fixed order, so the same bits everywhere, and free of branches, so that a loop over it becomes vector code.
/// Argument reduction and polynomial are those of Cephes' `expf` (Moshier).
#[inline]
fn exp_nonpositive(x: f32) -> f32 {
    const LOWEST: f32 = -87.0;
    /// 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > LOWEST { x } else { LOWEST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    let fraction = p * r * r + r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x > LOWEST { fraction * power } else { 0.0 }
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
        let max = logits[ids[0] as usize];
        let weight = |id: u32| f64::from(exp_nonpositive((logits[id as usize] - max) / s.temperature));
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

    #[test]
    fn exp_is_accurate() {
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-0.0), 1.0);
        for x in [-87.0, -1000.0, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp_nonpositive(x), 0.0);
        }
        for i in 1..200_000 {
            let x = -86.9 * i as f32 / 200_000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp_nonpositive(x)) - exact).abs() / exact;
            assert!(error < 2.5e-7, "exp({x}): relative error {error:e}");
        }
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

        /// Insertion and quickselect are one order.
        #[test]
        fn the_best_are_those_of_a_full_sort(logits in logit_rows(), n in 0usize..600) {
            let mut sampler = Sampler::default();
            sampler.select_best(&logits, n);
            let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
            ids.sort_by(|&a, &b| order(&logits, a, b));
            ids.truncate(n);
            prop_assert_eq!(&sampler.ids, &ids);
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
