//! Advice: how many redundant slots, which split, and whether rebalancing while serving is worth it, from runs of the
//! alternatives.

use crate::cost::CostModel;
use crate::placement::PolicyName;
use crate::report::data::{Advice, Loss, Run, Verdict};
use crate::report::figures;
use crate::simulate::Choice;
use crate::split::Split;
use crate::topology::Cluster;
use crate::{Error, Result};

/// Two throughputs closer than this are equal, and the one that needs less wins.
const EQUAL: f64 = 0.005;
/// Part of a device's memory that experts may take; the rest is for attention, cache and activations.
const EXPERT_MEMORY: f64 = 0.7;
/// Redundant slots per rank that are tried.
const EXTRA_PER_RANK: [usize; 4] = [0, 1, 2, 4];

/// What advice is asked for.
#[derive(Debug, Clone)]
pub struct Question {
    /// What is served now.
    pub baseline: Choice,
    /// The policy that placements are planned with.
    pub policy: PolicyName,
    /// Splits that may be used, the cheapest first.
    pub splits: Vec<Split>,
    /// Redundant slots per layer to try; those that fit and divide when empty.
    pub redundant: Vec<usize>,
    /// The time between two rebalances.
    pub horizon_s: f64,
}

impl Question {
    /// The runs to make: what is served now, then the alternatives, those that need least first.
    ///
    /// # Errors
    /// [`Error::Impossible`] when not even one copy of every expert fits, with the memory it takes.
    pub fn choices(
        &self,
        experts: usize,
        layers: usize,
        cluster: &Cluster,
        cost: &CostModel,
    ) -> Result<Vec<Choice>> {
        let ranks = self.baseline.ranks;
        let room = cluster.memory_bytes() as f64 * EXPERT_MEMORY;
        let per_rank = |redundant: usize| (experts + redundant).div_ceil(ranks);
        let bytes = |redundant: usize| (per_rank(redundant) * layers) as f64 * cost.expert_bytes();
        let least = per_rank(0) * ranks - experts;
        let redundant: Vec<usize> = match self.redundant.is_empty() {
            false => self.redundant.clone(),
            true => {
                let tried = EXTRA_PER_RANK.map(|extra| least + extra * ranks);
                tried.into_iter().filter(|r| per_rank(*r) <= experts && bytes(*r) <= room).collect()
            }
        };
        if redundant.is_empty() {
            return Err(Error::Impossible(format!(
                "{layers} layers of {experts} experts on {ranks} ranks take {} per rank, {} has {} of which {:.0} % are for experts",
                figures::bytes(bytes(least)),
                cluster.device.name,
                figures::bytes(cluster.memory_bytes() as f64),
                100.0 * EXPERT_MEMORY
            )));
        }
        let mut choices = vec![self.baseline.clone()];
        for &redundant in &redundant {
            for &split in &self.splits {
                let alternative = Choice {
                    ranks,
                    redundant,
                    policy: self.policy,
                    placement: None,
                    split,
                    rebalancing: None,
                };
                // Without replicas there is nothing to split.
                let pointless = experts + redundant <= experts && split != self.splits[0];
                if !pointless && !choices.contains(&alternative) {
                    choices.push(alternative);
                }
            }
        }
        Ok(choices)
    }

    /// The answer from the finished runs, in the order of `choices`.
    ///
    /// # Panics
    /// When there is not one run per choice.
    pub fn answer(&self, choices: &[Choice], runs: &[Run], cost: &CostModel) -> Advice {
        assert_eq!(choices.len(), runs.len(), "one run per choice");
        let baseline = &runs[0];
        let fastest = runs.iter().map(|run| run.totals.tokens_per_s).fold(0.0, f64::max);
        let good = |run: &Run| run.totals.tokens_per_s >= fastest * (1.0 - EQUAL);
        let index = runs.iter().position(good).unwrap_or(0);
        let (choice, run) = (&choices[index], &runs[index]);
        let gain = ratio(run.totals.tokens_per_s, baseline.totals.tokens_per_s) - 1.0;
        let lost: f64 = run.losses.iter().map(|loss| loss.share).sum();
        let beyond_repair = share(run, "sampling noise") + share(run, "structure");
        let verdict = self.verdict(run, cost);
        let experts = run.slots - choice.redundant;
        let slots_bytes = (run.slots - experts) as f64 / run.slots as f64 * run.totals.expert_bytes_per_rank;
        let mut reasons = vec![
            match index {
                0 => format!(
                    "{} is what is served; nothing tried is more than {:.1} % faster",
                    run.name,
                    100.0 * EQUAL
                ),
                _ => format!(
                    "{}: {:+.1} % tokens per second against {} ({} against {} a step; balancedness {:.3} against {:.3})",
                    run.name,
                    100.0 * gain,
                    baseline.name,
                    figures::micros(run.totals.step_us),
                    figures::micros(baseline.totals.step_us),
                    run.totals.actual,
                    baseline.totals.actual
                ),
            },
            self.on_slots(choices, runs, index),
            format!(
                "{:.1} % of its step time are lost to imbalance: {:.1} % can be won back by split, placement or slots, {:.1} % cannot (chance and structure)",
                100.0 * lost,
                100.0 * (lost - beyond_repair),
                100.0 * beyond_repair
            ),
        ];
        if let Some(regime) = on_regime(run, cost) {
            reasons.push(regime);
        }
        Advice {
            choice: run.name.clone(),
            redundant: choice.redundant,
            gain,
            beyond_repair,
            memory_bytes_per_rank: slots_bytes,
            verdict,
            reasons,
        }
    }

    /// What each number of redundant slots brings at best.
    fn on_slots(&self, choices: &[Choice], runs: &[Run], chosen: usize) -> String {
        let mut best: Vec<(usize, f64, f64)> = Vec::new();
        for (choice, run) in choices.iter().zip(runs).skip(1) {
            let (speed, bytes) = (run.totals.tokens_per_s, run.totals.expert_bytes_per_rank);
            match best.iter_mut().find(|(redundant, ..)| *redundant == choice.redundant) {
                Some((_, fastest, _)) => *fastest = speed.max(*fastest),
                None => best.push((choice.redundant, speed, bytes)),
            }
        }
        let reference = runs[0].totals.tokens_per_s;
        let each = best.iter().map(|(redundant, speed, bytes)| {
            let gain = 100.0 * (ratio(*speed, reference) - 1.0);
            format!("+{redundant} {gain:+.1} % with {} of experts per rank", figures::bytes(*bytes))
        });
        format!(
            "redundant slots: {}; +{} is the least within {:.1} % of the fastest",
            each.collect::<Vec<_>>().join(", "),
            choices[chosen].redundant,
            100.0 * EQUAL
        )
    }

    /// What a placement for the traffic of the day would bring over the horizon, against moving to it.
    fn verdict(&self, run: &Run, cost: &CostModel) -> Verdict {
        let placement = run.losses.iter().find(|loss| loss.cause == "placement");
        let gain = placement.map_or(0.0, |loss| loss.share);
        let bytes = placement.and_then(|loss| loss.moved_bytes).unwrap_or(0.0);
        let moving_s = placement.and_then(|loss| loss.moving_us).unwrap_or(0.0) / 1e6;
        let stall_s = cost.switch_us() * run.layers.len() as f64 / 1e6;
        let (gain_s, cost_s) = (gain * self.horizon_s, if bytes > 0.0 { moving_s + stall_s } else { 0.0 });
        let numbers = Verdict { gain_s, cost_s, horizon_s: self.horizon_s, bytes, ..Verdict::default() };
        let noticeable = numbers.is_noticeable();
        let against = match noticeable {
            true => format!(
                "moving {} takes {moving_s:.2} s, switching {stall_s:.3} s; it pays after {:.0} s",
                figures::bytes(bytes),
                cost_s / gain
            ),
            // Nor is it said then what would have to move: see the losses.
            false => format!("below {:.1} % nobody would notice", 100.0 * Verdict::LEAST_GAIN),
        };
        let reason = format!(
            "a placement for this traffic would save {:.2} % of the step time, {gain_s:.2} s of {:.0} s; {against}",
            100.0 * gain,
            self.horizon_s,
        );
        Verdict { worth_it: noticeable && gain_s > cost_s, reason, ..numbers }
    }
}

/// Says when reading weights, not computing tokens, is what takes time: balance of tokens matters little then.
fn on_regime(run: &Run, cost: &CostModel) -> Option<String> {
    let layers = run.layers.len().max(1) as f64;
    let rows =
        run.layers.iter().map(|layer| layer.max_tokens / layer.max_activated.max(1.0)).sum::<f64>() / layers;
    let ridge = cost.ridge_tokens_per_expert();
    (rows < ridge).then(|| {
        let ridge = if ridge.is_finite() { format!("{ridge:.0}") } else { "any number".to_owned() };
        format!(
            "an activated expert gets {rows:.0} rows on the busiest rank and would need {ridge} before computing takes longer than reading its weights: here the number of activated experts counts more than the balance of rows, and more copies cost time"
        )
    })
}

fn share(run: &Run, cause: &str) -> f64 {
    run.losses.iter().find(|loss: &&Loss| loss.cause == cause).map_or(0.0, |loss| loss.share)
}

fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{Constants, ModelShape};
    use crate::report::data::{LayerFigures, Totals};

    fn cost(cluster: &Cluster) -> CostModel {
        let model = ModelShape::find("gpt-oss-20b").unwrap();
        CostModel::new(cluster, 8, &model, &Constants::default()).unwrap()
    }

    fn question() -> Question {
        let baseline = Choice {
            ranks: 8,
            redundant: 0,
            policy: PolicyName::Linear,
            placement: None,
            split: Split::Even,
            rebalancing: None,
        };
        Question {
            baseline,
            policy: PolicyName::Eplb,
            splits: vec![Split::Even, Split::Exact],
            redundant: Vec::new(),
            horizon_s: 100.0,
        }
    }

    fn run(name: &str, slots: usize, tokens_per_s: f64, placement: (f64, f64, f64)) -> Run {
        let loss = |cause: &str, share| Loss { cause: cause.into(), share, ..Loss::default() };
        let (share, bytes, us) = placement;
        Run {
            name: name.into(),
            slots,
            totals: Totals { tokens_per_s, expert_bytes_per_rank: slots as f64 * 1e9, ..Totals::default() },
            layers: vec![LayerFigures { max_tokens: 10.0, max_activated: 5.0, ..LayerFigures::default() }],
            losses: vec![
                loss("sampling noise", 0.02),
                loss("split", 0.01),
                Loss { moved_bytes: Some(bytes), moving_us: Some(us), ..loss("placement", share) },
                loss("structure", 0.005),
            ],
            ..Run::default()
        }
    }

    #[test]
    fn alternatives_fit_the_memory_and_divide() {
        let cluster = Cluster::find("h100-8").unwrap();
        let cost = cost(&cluster);
        let named = |question: &Question, experts, layers| {
            let choices = question.choices(experts, layers, &cluster, &cost).unwrap();
            choices.iter().map(|c| (c.redundant, c.split)).collect::<Vec<_>>()
        };
        let (even, exact) = (Split::Even, Split::Exact);
        let all = named(&question(), 32, 24);
        assert_eq!(all[..4], [(0, even), (0, even), (8, even), (8, exact)]);
        assert_eq!(all[6..], [(32, even), (32, exact)]);
        // 30 experts need 2 more slots to divide; 50 MB x 24 layers x 10 slots is the limit of a small device.
        assert_eq!(named(&question(), 30, 24)[1], (2, even));
        let mut small = cluster.clone();
        small.device.memory_gib = 9.0;
        let fits = question().choices(32, 24, &small, &cost).unwrap();
        assert_eq!(fits.iter().map(|c| c.redundant).max(), Some(8));
        small.device.memory_gib = 1.0;
        let refused = question().choices(32, 24, &small, &cost).unwrap_err().to_string();
        assert!(refused.contains("24 layers of 32 experts on 8 ranks take 4.78 GB per rank"), "{refused}");
        let given = Question { redundant: vec![16], ..question() };
        assert_eq!(named(&given, 32, 24), [(0, even), (16, even), (16, exact)]);
    }

    #[test]
    fn the_least_that_is_as_fast_wins() {
        let cluster = Cluster::find("h100-8").unwrap();
        let cost = cost(&cluster);
        let question = Question { redundant: vec![8, 16], ..question() };
        let choices = question.choices(32, 24, &cluster, &cost).unwrap();
        let speeds = [100.0, 105.0, 110.0, 109.0, 110.2];
        let runs: Vec<Run> = choices
            .iter()
            .zip(speeds)
            .map(|(c, speed)| run(&c.name(), 32 + c.redundant, speed, (0.04, 8e9, 2e6)))
            .collect();
        let advice = question.answer(&choices, &runs, &cost);
        assert_eq!((advice.choice.as_str(), advice.redundant), (runs[2].name.as_str(), 8));
        assert!((advice.gain - 0.1).abs() < 1e-12 && (advice.beyond_repair - 0.025).abs() < 1e-12);
        assert!((advice.memory_bytes_per_rank - 8e9).abs() < 1.0);
        // 4 % of 100 s against 2 s of travelling.
        let verdict = &advice.verdict;
        assert!(verdict.worth_it && (verdict.gain_s - 4.0).abs() < 1e-9, "{verdict:?}");
        assert!((verdict.cost_s - 2.0 - 50e-6).abs() < 1e-9, "{verdict:?}");
        assert!(verdict.reason.contains("8.00 GB"), "{}", verdict.reason);
        assert!(
            advice.reasons[1].contains("+8 +10.0 % with 40.0 GB of experts per rank, +16 +10.2 %"),
            "{:?}",
            advice.reasons
        );
        assert!(advice.reasons[3].contains("gets 2 rows"), "{:?}", advice.reasons);
        let short = Question { horizon_s: 40.0, ..question };
        let verdict = short.answer(&choices, &runs, &cost).verdict;
        assert_eq!((verdict.worth_it, verdict.in_words()), (false, "not worth it"), "1.6 s against 2 s");
        let tiny: Vec<Run> =
            choices.iter().map(|c| run(&c.name(), 32 + c.redundant, 100.0, (0.0009, 0.0, 0.0))).collect();
        let verdict = short.answer(&choices, &tiny, &cost).verdict;
        assert_eq!((verdict.worth_it, verdict.in_words()), (false, "little to gain"), "{verdict:?}");
    }
}
