//! From one row of logits to the next token. Pure: the same row, request and history give the same token in any batch and
//! on any rank.
//!
//! The order of the steps, which is vLLM's:
//! 1. log-probabilities, from the logits as the model gave them;
//! 2. `adjust`: constraint, allowed tokens, bad words, stop tokens before `min_tokens`, logit bias, penalties for
//!    repetition, frequency, presence;
//! 3. temperature 0: the best token. Else temperature, min_p, top_k, top_p (of what the two before left), and a draw, as
//!    [`crate::backend::draw`] says.
//!
//! One tie-break everywhere: a higher logit is better, then a lower id; so temperature 0, top_k 1 and a tiny top_p choose
//! the same token. Where a request asks for the last step alone, the device that has the logits does it, with the same token
//! ([`draw_of`]). Scratch memory is kept, so choosing a token allocates nothing once it has its size.

mod adjust;
mod random;

use super::plan::{RowJob, RowResult, RowTask};
use super::request::{Request, Sampling, TokenEvent};
use crate::backend::draw::{Draw, Drawer, ONE, Weights, argmax, rank, select_best};
use adjust::Adjuster;
use random::random;

/// A row that no token can be chosen from.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RowError {
    /// The model is at fault.
    #[error(
        "the model produced {count} non-finite logits of {vocab} at position {position}, the first for token {token}"
    )]
    NonFinite {
        /// NaNs and infinities in the row.
        count: usize,
        /// Length of the row.
        vocab: usize,
        /// The first token with one.
        token: usize,
        /// Position that was to be sampled.
        position: u32,
    },
    /// The request is at fault: its rules exclude one another.
    #[error(
        "allowed_token_ids, bad_words, min_tokens and the grammar leave no token to choose at position {position}"
    )]
    NothingAllowed {
        /// Position that was to be sampled.
        position: u32,
    },
    /// The request's constraint gave up.
    #[error("the constraint of the text failed at position {position}: {why}")]
    Constraint {
        /// Position that was to be sampled.
        position: u32,
        /// In the constraint's words.
        why: String,
    },
}

/// How the job's token is drawn from its row, where the job asks for nothing else.
pub fn draw_of(job: &RowJob) -> Option<Draw> {
    let request = &job.request;
    let alone = job.task == RowTask::Sample
        && !job.capture
        && request.logprobs.is_none()
        && !adjust::changes(request, job.position);
    alone.then(|| drawn(&request.sampling, job.position))
}

fn drawn(sampling: &Sampling, position: u32) -> Draw {
    let &Sampling { temperature, top_p, top_k, min_p, seed, .. } = sampling;
    if temperature == 0.0 {
        return Draw::GREEDY;
    }
    // More tokens than u32 counts are all of them.
    let top_k = u32::try_from(top_k).unwrap_or(0);
    Draw { random: random(seed, position), temperature, top_p, min_p, top_k }
}

/// Chooses tokens; holds only scratch memory.
#[derive(Debug, Default)]
pub struct Sampler {
    adjuster: Adjuster,
    drawer: Drawer,
    weights: Weights,
    /// Token ids, best first.
    ids: Vec<u32>,
}

impl Sampler {
    /// Does one job on its row `[vocab]`. `generated` is the text so far, where [`Request::needs_history`].
    pub fn run(&mut self, index: u32, job: &RowJob, generated: &[u32], logits: &[f32]) -> RowResult {
        let outcome = check_finite(logits, job.position).and_then(|()| match job.task {
            RowTask::Sample => self.sample(logits, &job.request, job.position, generated).map(Some),
            RowTask::Score(token) => Ok(Some(self.score(logits, token, job.request.prompt_logprobs))),
            RowTask::Nothing => Ok(None),
        });
        RowResult { job: index, outcome, logits: job.capture.then(|| logits.to_vec()) }
    }

    /// Chooses the token at `position` from finite `logits` and reports the log-probabilities asked for.
    ///
    /// # Errors
    /// When what the request asks for excludes every token.
    pub fn sample(
        &mut self,
        logits: &[f32],
        request: &Request,
        position: u32,
        generated: &[u32],
    ) -> Result<TokenEvent, RowError> {
        let adjusted = self.adjuster.adjust(logits, request, position, generated)?;
        let best = argmax(adjusted);
        if adjusted[best as usize] == f32::NEG_INFINITY {
            return Err(RowError::NothingAllowed { position });
        }
        let token = self.drawer.draw(adjusted, best, &drawn(&request.sampling, position));
        Ok(self.score(logits, token, request.logprobs))
    }

    /// What the model thinks of `token`, and its `n` favourites, when asked for.
    fn score(&mut self, logits: &[f32], token: u32, n: Option<usize>) -> TokenEvent {
        let Some(n) = n else {
            return TokenEvent { token, logprob: None, rank: 0, top: Vec::new() };
        };
        let max = logits[argmax(logits) as usize];
        self.weights.weigh(logits, max, 1.0, 0.0);
        let normalizer = f64::from(max) + (self.weights.mass() as f64 / ONE as f64).ln();
        let logprob = |id: u32| (f64::from(logits[id as usize]) - normalizer) as f32;
        select_best(&mut self.ids, logits, n);
        let top = self.ids.iter().map(|&id| (id, logprob(id))).collect();
        TokenEvent { token, logprob: Some(logprob(token)), rank: rank(logits, token), top }
    }
}

/// Refuses NaNs and infinities.
fn check_finite(logits: &[f32], position: u32) -> Result<(), RowError> {
    // Counting all of them, rather than stopping at the first, keeps the usual pass free of branches.
    let count = logits.iter().filter(|x| !x.is_finite()).count();
    if count == 0 {
        return Ok(());
    }
    let token = logits.iter().position(|x| !x.is_finite()).expect("one was counted");
    Err(RowError::NonFinite { count, vocab: logits.len(), token, position })
}

#[cfg(test)]
mod tests;
