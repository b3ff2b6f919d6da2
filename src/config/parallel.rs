//! Parallel degrees: from those the user gave to all of them, checked against the model.

use std::fmt;

use super::flags::RawOptions;
use crate::error::{Error, Result};
use crate::spec::{Attention, FeedForward, ModelSpec, Split};

/// Most ranks of one process.
pub const MAX_RANKS: usize = 512;

/// How many nearest combinations a refusal names.
const SUGGESTIONS: usize = 3;

/// Parallel degrees of a run. World = TP x DP = EP x X.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parallel {
    /// Ranks that share attention heads (TP).
    pub tp: usize,
    /// Groups of ranks with sequences of their own (DP).
    pub dp: usize,
    /// Ranks, or groups of `expert_tp` ranks, that share the experts (EP).
    pub ep: usize,
    /// Ranks that share the width of one expert (X).
    pub expert_tp: usize,
    /// All ranks.
    pub world: usize,
}

impl Parallel {
    /// One rank that does everything.
    pub const SINGLE: Parallel = Parallel { tp: 1, dp: 1, ep: 1, expert_tp: 1, world: 1 };

    /// Fills in the degrees that were not given: TP is 1, DP is max(1, EP / TP), EP is TP x DP.
    ///
    /// # Errors
    /// [`Error::Config`] when a degree is 0, the combination does not divide the ranks or the model, or pipeline
    /// stages are asked for; it names the nearest combinations that divide.
    pub fn resolve(raw: &RawOptions, spec: &ModelSpec) -> Result<Parallel> {
        for (flag, given) in [
            ("tensor-parallel-size", raw.tensor_parallel_size),
            ("data-parallel-size", raw.data_parallel_size),
            ("expert-parallel-size", raw.expert_parallel_size),
        ] {
            if let Some(n) = given.filter(|n| !(1..=MAX_RANKS).contains(n)) {
                return Err(Error::config(flag, format!("expected 1 to {MAX_RANKS} ranks, found {n}")));
            }
        }
        if let Some(n) = raw.pipeline_parallel_size.filter(|&n| n != 1) {
            let why = format!("pipeline stages are not supported yet: expected 1, found {n}");
            return Err(Error::config("pipeline-parallel-size", why));
        }
        let tp = raw.tensor_parallel_size.unwrap_or(1);
        let needed_by_ep = raw.expert_parallel_size.map_or(1, |ep| ep / tp).max(1);
        let dp = raw.data_parallel_size.unwrap_or(needed_by_ep);
        let ep = raw.expert_parallel_size.unwrap_or(tp * dp);
        Self::check(tp, dp, ep, spec).map_err(|why| {
            let nearest = nearest(tp, dp, ep, spec);
            let list: Vec<String> = nearest.iter().map(Parallel::to_string).collect();
            let asked = format!("TP {tp}, DP {dp}, EP {ep}");
            Error::config(asked, format!("{why}; the nearest that divide are: {}", list.join(" | ")))
        })
    }

    /// The combination, or why it does not divide.
    fn check(tp: usize, dp: usize, ep: usize, spec: &ModelSpec) -> Result<Parallel, String> {
        let world = tp * dp;
        if world > MAX_RANKS {
            return Err(format!("TP x DP is {world} ranks, more than {MAX_RANKS}"));
        }
        if !world.is_multiple_of(ep) {
            return Err(format!("EP {ep} does not divide the {world} ranks of TP x DP"));
        }
        let parallel = Parallel { tp, dp, ep, expert_tp: world / ep, world };
        parallel.check_model(spec)?;
        Ok(parallel)
    }

    fn check_model(&self, spec: &ModelSpec) -> Result<(), String> {
        let divides = |what: &str, size: usize, degree: &str, n: usize| {
            let refusal = || format!("{what} ({size}) does not divide by {degree} {n}");
            size.is_multiple_of(n).then_some(()).ok_or_else(refusal)
        };
        divides("the number of attention heads", spec.attention.heads(), "TP", self.tp)?;
        if let Attention::Gqa { kv_heads, .. } = spec.attention
            && !self.tp.is_multiple_of(kv_heads)
        {
            divides("the number of KV heads", kv_heads, "TP", self.tp)?;
        }
        for layer in &spec.layers {
            if let FeedForward::Dense { intermediate } = layer.ffn {
                divides("the dense intermediate width", intermediate, "TP", self.tp)?;
            }
        }
        divides("the expert intermediate width", spec.moe.intermediate, "TP x DP / EP =", self.expert_tp)
    }

    /// Slots per rank for `experts` experts and `redundant` more: padded with empty ones to a multiple of EP.
    pub fn slots_per_rank(&self, experts: usize, redundant: usize) -> usize {
        (experts + redundant).div_ceil(self.ep)
    }

    /// What one rank's weights depend on.
    pub fn split(&self, slots_per_rank: usize) -> Split {
        Split { tensor: self.tp, expert_tensor: self.expert_tp, slots: slots_per_rank }
    }
}

impl fmt::Display for Parallel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parallel { tp, dp, ep, .. } = self;
        write!(f, "--tensor-parallel-size {tp} --data-parallel-size {dp} --expert-parallel-size {ep}")
    }
}

/// Combinations that divide, nearest first; whole experts, then fewer ranks win a tie. One rank always divides.
fn nearest(tp: usize, dp: usize, ep: usize, spec: &ModelSpec) -> Vec<Parallel> {
    let mut found = Vec::new();
    for t in 1..=(2 * tp).min(MAX_RANKS) {
        for d in 1..=(2 * dp.max(ep)).min(MAX_RANKS / t) {
            let divisors = (1..=t * d).filter(|e| (t * d).is_multiple_of(*e));
            found.extend(divisors.filter_map(|e| Parallel::check(t, d, e, spec).ok()));
        }
    }
    found.sort_by_key(|p| {
        (p.tp.abs_diff(tp) + p.dp.abs_diff(dp) + p.ep.abs_diff(ep), p.expert_tp, p.world, p.tp)
    });
    found.truncate(SUGGESTIONS);
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::families;

    /// 4 heads, 2 KV heads, 8 experts of width 80.
    fn mixtral() -> ModelSpec {
        families::resolve(include_bytes!("../../tests/fixtures/mixtral/config.json")).unwrap().spec
    }

    /// 4 latent heads, dense width 128, 16 experts of width 24.
    fn deepseek() -> ModelSpec {
        families::resolve(include_bytes!("../../tests/fixtures/deepseek_v3/config.json")).unwrap().spec
    }

    fn raw(tp: Option<usize>, dp: Option<usize>, ep: Option<usize>) -> RawOptions {
        RawOptions {
            tensor_parallel_size: tp,
            data_parallel_size: dp,
            expert_parallel_size: ep,
            ..RawOptions::default()
        }
    }

    #[test]
    fn degrees_follow_from_those_given() {
        // given TP, DP, EP -> TP, DP, EP, X
        for (given, expected) in [
            ((None, None, None), (1, 1, 1, 1)),
            ((Some(4), None, None), (4, 1, 4, 1)),
            ((None, None, Some(4)), (1, 4, 4, 1)),
            ((None, Some(3), None), (1, 3, 3, 1)),
            ((Some(2), None, Some(4)), (2, 2, 4, 1)),
            ((Some(4), None, Some(2)), (4, 1, 2, 2)),
            ((Some(2), Some(2), Some(1)), (2, 2, 1, 4)),
            ((None, Some(8), Some(4)), (1, 8, 4, 2)),
            ((None, None, Some(12)), (1, 12, 12, 1)),
        ] {
            let (tp, dp, ep) = given;
            let p = Parallel::resolve(&raw(tp, dp, ep), &mixtral()).unwrap();
            assert_eq!((p.tp, p.dp, p.ep, p.expert_tp), expected, "{given:?}");
            assert_eq!(p.world, p.tp * p.dp);
            assert_eq!(p.world, p.ep * p.expert_tp);
        }
    }

    #[test]
    fn what_does_not_divide_is_refused_with_the_nearest_that_do() {
        let refusal =
            |tp, dp, ep, spec: &ModelSpec| Parallel::resolve(&raw(tp, dp, ep), spec).unwrap_err().to_string();
        let heads = refusal(Some(3), None, None, &mixtral());
        assert_eq!(
            heads,
            "TP 3, DP 1, EP 3: the number of attention heads (4) does not divide by TP 3; the nearest that divide are: \
             --tensor-parallel-size 2 --data-parallel-size 1 --expert-parallel-size 2 | \
             --tensor-parallel-size 4 --data-parallel-size 1 --expert-parallel-size 4 | \
             --tensor-parallel-size 4 --data-parallel-size 1 --expert-parallel-size 2"
        );
        let world = refusal(Some(2), None, Some(3), &mixtral());
        assert!(world.contains("EP 3 does not divide the 2 ranks of TP x DP"), "{world}");
        assert!(
            world.contains("--tensor-parallel-size 2 --data-parallel-size 1 --expert-parallel-size 2"),
            "{world}"
        );
        let width = refusal(Some(1), Some(16), Some(1), &deepseek());
        assert!(
            width.contains("expert intermediate width (24) does not divide by TP x DP / EP = 16"),
            "{width}"
        );

        let mut spec = deepseek();
        spec.layers[0].ffn = FeedForward::Dense { intermediate: 129 };
        assert!(refusal(Some(2), None, None, &spec).contains("dense intermediate width (129)"));
        let mut spec = mixtral();
        let Attention::Gqa { heads, kv_heads, .. } = &mut spec.attention else { unreachable!() };
        (*heads, *kv_heads) = (12, 3);
        assert!(refusal(Some(2), None, None, &spec).contains("KV heads (3)"));
        assert_eq!(Parallel::resolve(&raw(Some(6), None, None), &spec).unwrap().tp, 6);
    }

    #[test]
    fn limits_are_named() {
        let of = |raw: RawOptions| Parallel::resolve(&raw, &mixtral()).unwrap_err().to_string();
        assert_eq!(of(raw(Some(0), None, None)), "tensor-parallel-size: expected 1 to 512 ranks, found 0");
        assert_eq!(
            of(raw(None, None, Some(usize::MAX))),
            format!("expert-parallel-size: expected 1 to 512 ranks, found {}", usize::MAX)
        );
        assert!(of(raw(Some(4), Some(512), None)).contains("TP x DP is 2048 ranks, more than 512"));
        let stages = RawOptions { pipeline_parallel_size: Some(2), ..RawOptions::default() };
        let why = "pipeline-parallel-size: pipeline stages are not supported yet: expected 1, found 2";
        assert_eq!(of(stages), why);
        let one = RawOptions { pipeline_parallel_size: Some(1), ..RawOptions::default() };
        assert_eq!(Parallel::resolve(&one, &mixtral()).unwrap(), Parallel::SINGLE);
    }

    #[test]
    fn slots_are_padded_to_a_multiple_of_ep() {
        let ep = |ep| Parallel { ep, ..Parallel::SINGLE };
        assert_eq!(ep(1).slots_per_rank(8, 0), 8);
        assert_eq!(ep(3).slots_per_rank(8, 0), 3);
        assert_eq!(ep(4).slots_per_rank(8, 4), 3);
        assert_eq!(ep(12).slots_per_rank(8, 0), 1);
    }
}
