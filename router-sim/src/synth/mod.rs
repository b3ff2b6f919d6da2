//! Synthetic traffic: tokens whose experts follow a described popularity, the same for a seed on any machine and any
//! number of threads.
//!
//! Each layer gives its experts weights `w = exp(x)`. A token of topic `t` draws its experts one after another without
//! repetition, each in proportion to its weight: first, where routing is group-limited, the groups in proportion to
//! the sums of their experts' weights, then the experts within the chosen groups. What shapes the weights:
//!
//! - [`Popularity`]: how uneven experts are. Real records are closer to log-normal (sigma about 0.65 for DeepSeek-V3,
//!   1.6 for Gemma) than to Zipf.
//! - topics: each topic adds its own normal noise to `x`. A request keeps its topic, so tokens of one request resemble
//!   each other, and a batch of few requests is more uneven than its size alone explains.
//! - drift: `x` is a random walk from step to step.
//! - bursts: now and then one expert of a layer is hotter for some steps.

mod experts;
mod tokens;

pub use tokens::SynthTokens;

use crate::load::Phase;
use crate::{Error, Result};

/// How uneven experts are by nature.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Popularity {
    /// All alike.
    Uniform,
    /// Logarithms of the weights are normal with this standard deviation.
    LogNormal(f64),
    /// The r-th most popular expert has weight `r^-s`; which one that is differs from layer to layer.
    Zipf(f64),
}

/// One expert of a layer becomes hotter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bursts {
    /// Chance per layer and step that one begins.
    pub rate: f64,
    /// Times which the expert's weight is taken.
    pub factor: f64,
    /// How long it lasts.
    pub steps: u64,
}

/// What to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Name in the output.
    pub model: String,
    /// Absolute indices of the MoE layers.
    pub layer_ids: Vec<usize>,
    /// Experts per layer.
    pub experts: usize,
    /// Experts chosen per token.
    pub top_k: usize,
    /// Groups that a layer's experts are in, contiguous and equal; 1 for none.
    pub groups: usize,
    /// Groups that one token's experts may come from.
    pub top_groups: usize,
    /// Ranks that own the tokens.
    pub ranks: usize,
    /// Tokens of each rank in a step.
    pub tokens_per_rank: usize,
    /// Steps.
    pub steps: u64,
    /// Prefill: a rank's tokens are consecutive ones of few requests. Decode: each is of another request.
    pub phase: Phase,
    /// Tokens of a request: in prefill of its prompt, in decode of its answer.
    pub request_tokens: u64,
    /// How uneven experts are.
    pub popularity: Popularity,
    /// Topics, at least 1.
    pub topics: usize,
    /// Standard deviation of the noise that a topic adds to the logarithms of the weights.
    pub topic_sigma: f64,
    /// Standard deviation of what the logarithms of the weights change by within 100 steps.
    pub drift: f64,
    /// Experts that become hotter for a while.
    pub bursts: Option<Bursts>,
    /// Of everything that is drawn.
    pub seed: u64,
}

/// Most tokens of a step, over all ranks.
const MAX_STEP_TOKENS: usize = 1 << 22;
/// Most expert ids of a step: 2 GiB of them.
const MAX_STEP_IDS: usize = 1 << 30;
/// Most groups.
const MAX_GROUPS: usize = 64;
/// Most weights over all layers and topics.
const MAX_WEIGHTS: usize = 1 << 25;

impl Recipe {
    /// Every limit, with the value that breaks it.
    ///
    /// # Errors
    /// [`Error::Impossible`].
    pub fn check(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::Impossible(why));
        let (layers, experts) = (self.layer_ids.len(), self.experts);
        if layers == 0 || !(1..=1 << 16).contains(&experts) {
            return refuse(format!(
                "{layers} layers x {experts} experts: at least 1 each, at most {} experts",
                1 << 16
            ));
        }
        if let Some(pair) = self.layer_ids.windows(2).find(|pair| pair[0] >= pair[1]) {
            return refuse(format!("layer ids must ascend, but {} follows {}", pair[1], pair[0]));
        }
        if self.top_k == 0 || self.top_k > experts {
            return refuse(format!("top-k {} is not within 1..={experts} experts", self.top_k));
        }
        if !(1..=MAX_GROUPS).contains(&self.groups) || !experts.is_multiple_of(self.groups) {
            return refuse(format!(
                "{} groups: 1 to {MAX_GROUPS} that divide {experts} experts",
                self.groups
            ));
        }
        if !(1..=self.groups).contains(&self.top_groups) {
            return refuse(format!(
                "{} groups per token are not within 1..={} groups",
                self.top_groups, self.groups
            ));
        }
        if self.top_k > self.top_groups * (experts / self.groups) {
            return refuse(format!(
                "{} groups of {} experts cannot give a token {}",
                self.top_groups,
                experts / self.groups,
                self.top_k
            ));
        }
        let rows = self.ranks.saturating_mul(self.tokens_per_rank);
        if rows == 0 || rows > MAX_STEP_TOKENS || self.ranks > 1 << 16 {
            return refuse(format!(
                "{} ranks x {} tokens are not within 1..={MAX_STEP_TOKENS} per step",
                self.ranks, self.tokens_per_rank
            ));
        }
        if rows.saturating_mul(layers).saturating_mul(self.top_k) > MAX_STEP_IDS {
            return refuse(format!(
                "{rows} tokens x {layers} layers x top-k {} exceed the limit of {MAX_STEP_IDS} expert ids per step",
                self.top_k
            ));
        }
        if self.topics == 0 || self.topics.saturating_mul(layers).saturating_mul(experts) > MAX_WEIGHTS {
            return refuse(format!(
                "{} topics x {layers} layers x {experts} experts are not within 1..={MAX_WEIGHTS} weights",
                self.topics
            ));
        }
        if self.steps == 0 || self.request_tokens == 0 {
            return refuse(format!(
                "{} steps of requests of {} tokens: at least 1 each",
                self.steps, self.request_tokens
            ));
        }
        let (name, spread) = match self.popularity {
            Popularity::Uniform => ("popularity", 0.0),
            Popularity::LogNormal(sigma) => ("sigma of the popularity", sigma),
            Popularity::Zipf(exponent) => ("exponent of the popularity", exponent),
        };
        for (name, value) in [(name, spread), ("topic sigma", self.topic_sigma), ("drift", self.drift)] {
            if !(0.0..=10.0).contains(&value) {
                return refuse(format!("{name} {value} is not within 0..=10"));
            }
        }
        match self.bursts {
            Some(Bursts { rate, factor, steps })
                if !(0.0..=1.0).contains(&rate) || !(1.0..=1e6).contains(&factor) || steps == 0 =>
            {
                refuse(format!(
                    "bursts of rate {rate} (0 to 1), factor {factor} (1 to 1000000), {steps} steps (at least 1)"
                ))
            }
            _ => Ok(()),
        }
    }
}
