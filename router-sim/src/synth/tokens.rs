//! Tokens of a recipe as a stream, a batch per step.

use std::num::NonZero;
use std::thread;

use rand::RngExt;

use super::Recipe;
use super::experts::{LayerExperts, purpose, random};
use crate::Result;
use crate::load::Phase;
use crate::stream::{TokenBatch, TokenRow, TokenShape, TokenStream};
use crate::trace::RowInfo;

/// Makes one batch after another; holds one.
#[derive(Debug)]
pub struct SynthTokens {
    recipe: Recipe,
    shape: TokenShape,
    layers: Vec<LayerExperts>,
    step: u64,
    threads: usize,
}

impl SynthTokens {
    /// Before the first step. The threads change nothing but the time it takes.
    ///
    /// # Errors
    /// As [`Recipe::check`].
    pub fn new(recipe: Recipe) -> Result<Self> {
        recipe.check()?;
        let labels = match recipe.topics {
            1 => Vec::new(),
            topics => (0..topics).map(|topic| format!("topic-{topic}")).collect(),
        };
        let shape = TokenShape {
            model: recipe.model.clone(),
            layer_ids: recipe.layer_ids.clone(),
            experts: recipe.experts,
            top_k: recipe.top_k,
            ranks: Some(recipe.ranks),
            labels,
            weights: false,
        };
        let layers = (0..shape.layers()).map(|layer| LayerExperts::new(&recipe, layer)).collect();
        let threads = thread::available_parallelism().map_or(1, NonZero::get);
        Ok(SynthTokens { recipe, shape, layers, step: 0, threads })
    }

    /// Uses so many threads, at least 1.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads.max(1);
        self
    }

    fn take_rows(&self, rows: &mut Vec<TokenRow>) {
        for rank in 0..self.recipe.ranks {
            rows.extend((0..self.recipe.tokens_per_rank).map(|index| self.row(rank, index)));
        }
    }

    /// The token at a place of a rank in this step.
    fn row(&self, rank: usize, index: usize) -> TokenRow {
        let Recipe { phase, request_tokens, tokens_per_rank, ranks, .. } = self.recipe;
        let (request, position) = match phase {
            // A rank's prompts follow one another, cut into steps.
            Phase::Prefill => {
                let token = self.step * tokens_per_rank as u64 + index as u64;
                (token / request_tokens * ranks as u64 + rank as u64, token % request_tokens)
            }
            // Each place holds one request after another; they began at different times.
            Phase::Decode => {
                let place = (rank * tokens_per_rank + index) as u64;
                let mut rng = random(self.recipe.seed, purpose::REQUESTS, 0, place);
                let token = self.step + rng.random_range(0..request_tokens);
                let places = (ranks * tokens_per_rank) as u64;
                (token / request_tokens * places + place, token % request_tokens)
            }
        };
        let topic =
            random(self.recipe.seed, purpose::REQUESTS, 1, request).random_range(0..self.recipe.topics);
        let info = RowInfo { request, position, phase, recomputed: false };
        TokenRow { info, rank: rank as u32, label: topic as u16 }
    }
}

impl TokenStream for SynthTokens {
    fn shape(&self) -> &TokenShape {
        &self.shape
    }

    fn next_batch(&mut self, batch: &mut TokenBatch) -> Result<bool> {
        batch.clear();
        if self.step == self.recipe.steps {
            return Ok(false);
        }
        batch.step = self.step;
        self.take_rows(&mut batch.rows);
        let per_layer = batch.rows.len() * self.recipe.top_k;
        batch.ids.resize(per_layer * self.layers.len(), 0);
        let (recipe, step, rows) = (&self.recipe, self.step, &batch.rows);
        let mut work: Vec<_> =
            self.layers.iter_mut().zip(batch.ids.chunks_exact_mut(per_layer)).enumerate().collect();
        let share = work.len().div_ceil(self.threads);
        thread::scope(|scope| {
            for part in work.chunks_mut(share) {
                scope.spawn(move || {
                    for (layer, (experts, ids)) in part {
                        if step > 0 {
                            experts.advance(recipe, *layer, step);
                        }
                        let mut rng = random(recipe.seed, purpose::TOKENS, *layer, step);
                        for (row, chosen) in rows.iter().zip(ids.chunks_exact_mut(recipe.top_k)) {
                            experts.choose(recipe, usize::from(row.label), &mut rng, chosen);
                        }
                    }
                });
            }
        });
        self.step += 1;
        Ok(true)
    }

    fn skipped(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Bursts, Popularity};
    use super::*;
    use crate::load::{LoadWindow, balancedness};

    fn recipe() -> Recipe {
        Recipe {
            model: "test".into(),
            layer_ids: vec![3, 4, 5],
            experts: 32,
            top_k: 4,
            groups: 1,
            top_groups: 1,
            ranks: 4,
            tokens_per_rank: 64,
            steps: 10,
            phase: Phase::Decode,
            request_tokens: 16,
            popularity: Popularity::LogNormal(0.65),
            topics: 1,
            topic_sigma: 0.0,
            drift: 0.0,
            bursts: None,
            seed: 7,
        }
    }

    fn batches(recipe: Recipe, threads: usize) -> Vec<TokenBatch> {
        let mut tokens = SynthTokens::new(recipe).unwrap().with_threads(threads);
        let (mut batch, mut all) = (TokenBatch::default(), Vec::new());
        while tokens.next_batch(&mut batch).unwrap() {
            all.push(batch.clone());
        }
        all
    }

    fn load(batches: &[TokenBatch]) -> LoadWindow {
        let mut load = LoadWindow::new(&[3, 4, 5], 32);
        batches.iter().for_each(|batch| batch.add_to(&mut load));
        load
    }

    #[test]
    fn a_seed_gives_the_same_tokens_on_any_number_of_threads() {
        let all = Recipe {
            topics: 3,
            topic_sigma: 0.5,
            drift: 0.3,
            bursts: Some(Bursts { rate: 0.2, factor: 8.0, steps: 3 }),
            ..recipe()
        };
        assert_eq!(batches(all.clone(), 1), batches(all.clone(), 3));
        assert_ne!(batches(Recipe { seed: 8, ..all.clone() }, 1), batches(all, 1));
    }

    #[test]
    fn experts_of_a_token_differ_and_keep_to_their_groups() {
        let grouped = Recipe { groups: 8, top_groups: 2, popularity: Popularity::Zipf(3.0), ..recipe() };
        for batch in batches(grouped, 2) {
            for ids in batch.ids.chunks(4) {
                let mut sorted = ids.to_vec();
                sorted.sort_unstable();
                sorted.dedup();
                assert_eq!(sorted.len(), 4, "{ids:?}");
                let mut groups: Vec<u16> = sorted.iter().map(|id| id / 4).collect();
                groups.dedup();
                assert!(groups.len() <= 2, "{ids:?}");
            }
        }
        // All experts there are: the rest is drawn exactly.
        let every = Recipe { experts: 32, top_k: 32, popularity: Popularity::Zipf(10.0), ..recipe() };
        assert!(batches(every, 1).iter().all(|batch| {
            batch.ids.chunks(32).all(|ids| ids.iter().map(|id| u64::from(*id)).sum::<u64>() == 496)
        }));
    }

    #[test]
    fn unevenness_follows_the_popularity() {
        let of = |popularity| {
            let load = load(&batches(Recipe { popularity, ..recipe() }, 2));
            balancedness(&load.totals(0).collect::<Vec<_>>())
        };
        let (uniform, mild, steep) =
            (of(Popularity::Uniform), of(Popularity::LogNormal(0.65)), of(Popularity::Zipf(1.0)));
        assert!(uniform > 0.8 && mild < 0.6 && steep < 0.3 && mild > steep, "{uniform} {mild} {steep}");
    }

    /// Cosine of the loads of two stretches of steps.
    fn cosine(a: &LoadWindow, b: &LoadWindow) -> f64 {
        let dot = |x: &LoadWindow, y: &LoadWindow| {
            x.totals(0).zip(y.totals(0)).map(|(x, y)| x as f64 * y as f64).sum::<f64>()
        };
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    }

    #[test]
    fn drift_topics_and_bursts_show() {
        let halves = |recipe: Recipe| {
            let all = batches(recipe, 2);
            cosine(&load(&all[..3]), &load(&all[all.len() - 3..]))
        };
        let still = halves(recipe());
        let drifting = halves(Recipe { drift: 2.0, ..recipe() });
        assert!(still > 0.97 && drifting < still - 0.05, "{still} {drifting}");

        let topics = Recipe { topics: 2, topic_sigma: 1.0, ..recipe() };
        let all = batches(topics, 2);
        let of_topic = |topic| {
            let mut load = LoadWindow::new(&[3, 4, 5], 32);
            for batch in &all {
                let mut only = batch.clone();
                let keep: Vec<bool> = batch.rows.iter().map(|row| row.label == topic).collect();
                only.rows.retain(|row| row.label == topic);
                only.ids = batch
                    .ids
                    .chunks(4)
                    .zip(keep.iter().cycle())
                    .filter(|(_, keep)| **keep)
                    .flat_map(|(ids, _)| ids.to_vec())
                    .collect();
                only.add_to(&mut load);
            }
            load
        };
        assert!(cosine(&of_topic(0), &of_topic(1)) < 0.9);

        let bursts = Some(Bursts { rate: 1.0, factor: 1000.0, steps: 1 });
        let hottest: Vec<u16> = batches(Recipe { bursts, ..recipe() }, 1)[1..]
            .iter()
            .map(|batch| {
                let mut load = LoadWindow::new(&[3, 4, 5], 32);
                batch.add_to(&mut load);
                let counts: Vec<u64> = load.totals(0).collect();
                // Nearly every token of the step chose it.
                assert!(*counts.iter().max().unwrap() > 240, "{counts:?}");
                counts.iter().position(|n| n == counts.iter().max().unwrap()).unwrap() as u16
            })
            .collect();
        assert!(hottest.windows(2).any(|pair| pair[0] != pair[1]), "{hottest:?}");
    }

    #[test]
    fn requests_have_consecutive_positions() {
        for phase in Phase::ALL {
            let mut next = std::collections::HashMap::new();
            let mut seen = 0;
            for batch in batches(Recipe { phase, ..recipe() }, 1) {
                for row in &batch.rows {
                    if let Some(due) = next.insert(row.info.request, row.info.position + 1) {
                        assert_eq!(row.info.position, due, "{phase:?}");
                        seen += 1;
                    }
                }
            }
            assert!(seen > 1000, "{phase:?}: {seen}");
        }
    }

    #[test]
    fn refusals() {
        for (wrong, expected) in [
            (Recipe { experts: 0, ..recipe() }, "0 experts"),
            (Recipe { top_k: 33, ..recipe() }, "top-k 33"),
            (Recipe { groups: 5, ..recipe() }, "5 groups"),
            (Recipe { groups: 8, top_groups: 9, ..recipe() }, "9 groups per token"),
            (Recipe { groups: 16, top_groups: 1, ..recipe() }, "1 groups of 2 experts cannot give a token 4"),
            (Recipe { ranks: 0, ..recipe() }, "0 ranks"),
            (Recipe { tokens_per_rank: usize::MAX, ..recipe() }, "per step"),
            (Recipe { topics: 0, ..recipe() }, "0 topics"),
            (Recipe { steps: 0, ..recipe() }, "0 steps"),
            (Recipe { drift: f64::NAN, ..recipe() }, "drift NaN"),
            (Recipe { popularity: Popularity::Zipf(-1.0), ..recipe() }, "exponent of the popularity -1"),
            (Recipe { bursts: Some(Bursts { rate: 2.0, factor: 2.0, steps: 1 }), ..recipe() }, "rate 2"),
        ] {
            let message = SynthTokens::new(wrong).unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
    }
}
