//! How popular experts are, and draws from it.

use rand::distr::Distribution;
use rand::seq::SliceRandom;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rand_distr::weighted::WeightedAliasIndex;

use super::{Popularity, Recipe};

/// Draws that may hit what is already chosen before the rest is drawn exactly.
const MAX_TRIES: usize = 32;

/// Streams of random numbers that do not touch: one for each purpose, layer and step.
pub fn random(seed: u64, purpose: u64, layer: usize, step: u64) -> ChaCha8Rng {
    let mut words = [0u8; 32];
    for (word, value) in words.chunks_exact_mut(8).zip([seed, purpose, layer as u64, step]) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    ChaCha8Rng::from_seed(words)
}

/// Purposes of [`random`].
pub mod purpose {
    pub const POPULARITY: u64 = 0;
    pub const TOPICS: u64 = 1;
    pub const DRIFT: u64 = 2;
    pub const BURSTS: u64 = 3;
    pub const TOKENS: u64 = 4;
    pub const REQUESTS: u64 = 5;
}

/// The experts of one layer as they are in one step.
#[derive(Debug)]
pub struct LayerExperts {
    /// Logarithms of the weights, `[experts]`.
    logs: Vec<f64>,
    /// What each topic adds, `[topics][experts]`.
    topics: Vec<f64>,
    /// Bursts under way: expert, last step, what it adds.
    bursts: Vec<(usize, u64, f64)>,
    /// Draws of each topic.
    draws: Vec<Draw>,
}

/// Draws of one topic.
#[derive(Debug)]
struct Draw {
    weights: Vec<f32>,
    experts: WeightedAliasIndex<f32>,
    /// Sums of the groups' weights.
    groups: Vec<f64>,
}

impl LayerExperts {
    /// As they are before the first step.
    pub fn new(recipe: &Recipe, layer: usize) -> Self {
        let mut rng = random(recipe.seed, purpose::POPULARITY, layer, 0);
        let mut logs: Vec<f64> = match recipe.popularity {
            Popularity::Uniform => vec![0.0; recipe.experts],
            Popularity::LogNormal(sigma) => (0..recipe.experts).map(|_| sigma * normal(&mut rng)).collect(),
            Popularity::Zipf(exponent) => (1..=recipe.experts).map(|r| -exponent * (r as f64).ln()).collect(),
        };
        logs.shuffle(&mut rng);
        let mut rng = random(recipe.seed, purpose::TOPICS, layer, 0);
        let noise = if recipe.topics > 1 { recipe.topic_sigma } else { 0.0 };
        let topics = (0..recipe.topics * recipe.experts).map(|_| noise * normal(&mut rng)).collect();
        let mut layer = LayerExperts { logs, topics, bursts: Vec::new(), draws: Vec::new() };
        layer.rebuild(recipe);
        layer
    }

    /// Lets a step pass.
    pub fn advance(&mut self, recipe: &Recipe, layer: usize, step: u64) {
        let mut changed = false;
        if recipe.drift > 0.0 {
            let mut rng = random(recipe.seed, purpose::DRIFT, layer, step);
            // A random walk: variances add up to drift^2 over 100 steps.
            self.logs.iter_mut().for_each(|log| *log += recipe.drift / 10.0 * normal(&mut rng));
            changed = true;
        }
        if let Some(bursts) = recipe.bursts {
            let before = self.bursts.len();
            self.bursts.retain(|(_, last, _)| *last >= step);
            changed |= self.bursts.len() != before;
            let mut rng = random(recipe.seed, purpose::BURSTS, layer, step);
            if rng.random_bool(bursts.rate) {
                let expert = rng.random_range(0..recipe.experts);
                self.bursts.push((expert, step.saturating_add(bursts.steps - 1), bursts.factor.ln()));
                changed = true;
            }
        }
        if changed {
            self.rebuild(recipe);
        }
    }

    fn rebuild(&mut self, recipe: &Recipe) {
        let mut logs = self.logs.clone();
        self.bursts.iter().for_each(|(expert, _, more)| logs[*expert] += more);
        let draw = |noise: &[f64]| {
            let of_topic: Vec<f64> = logs.iter().zip(noise).map(|(log, noise)| log + noise).collect();
            // Against the largest, weights neither overflow nor all vanish.
            let largest = of_topic.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f32> =
                of_topic.iter().map(|log| (log - largest).exp().max(1e-30) as f32).collect();
            let groups = weights.chunks_exact(recipe.experts / recipe.groups);
            let groups = groups.map(|group| group.iter().map(|w| f64::from(*w)).sum()).collect();
            let experts = WeightedAliasIndex::new(weights.clone()).expect("positive finite weights");
            Draw { weights, experts, groups }
        };
        self.draws = self.topics.chunks_exact(recipe.experts).map(draw).collect();
    }

    /// Experts of one token, all different, best first.
    pub fn choose(&self, recipe: &Recipe, topic: usize, rng: &mut ChaCha8Rng, chosen: &mut [u16]) {
        let draw = &self.draws[topic];
        let groups = draw.choose_groups(recipe, rng);
        let group_size = recipe.experts / recipe.groups;
        for k in 0..chosen.len() {
            let (before, rest) = chosen.split_at_mut(k);
            let free = |expert: usize| {
                groups >> (expert / group_size) & 1 == 1 && !before.contains(&(expert as u16))
            };
            let drawn = (0..MAX_TRIES).map(|_| draw.experts.sample(rng)).find(|expert| free(*expert));
            rest[0] = drawn.unwrap_or_else(|| weighted(rng, &draw.weights, free)) as u16;
        }
    }
}

impl Draw {
    /// The groups that a token may go to, as bits.
    fn choose_groups(&self, recipe: &Recipe, rng: &mut ChaCha8Rng) -> u64 {
        if recipe.top_groups == recipe.groups {
            return u64::MAX;
        }
        let mut chosen = 0u64;
        for _ in 0..recipe.top_groups {
            let total: f64 =
                self.groups.iter().enumerate().filter(|(g, _)| chosen >> g & 1 == 0).map(|(_, w)| w).sum();
            let mut left = rng.random::<f64>() * total;
            let mut last = 0;
            for (group, weight) in self.groups.iter().enumerate().filter(|(g, _)| chosen >> g & 1 == 0) {
                last = group;
                left -= weight;
                if left < 0.0 {
                    break;
                }
            }
            chosen |= 1 << last;
        }
        chosen
    }
}

/// One of the free experts in proportion to its weight: the slow way, for what many tries do not hit.
fn weighted(rng: &mut impl Rng, weights: &[f32], free: impl Fn(usize) -> bool) -> usize {
    let candidates = || weights.iter().enumerate().filter(|(expert, _)| free(*expert));
    let total: f64 = candidates().map(|(_, weight)| f64::from(*weight)).sum();
    let mut left = rng.random::<f64>() * total;
    let mut last = 0;
    for (expert, weight) in candidates() {
        last = expert;
        left -= f64::from(*weight);
        if left < 0.0 {
            break;
        }
    }
    last
}

fn normal(rng: &mut ChaCha8Rng) -> f64 {
    StandardNormal.sample(rng)
}
