//! What a request asks to change about the logits before a token is chosen.

use super::RowError;
use crate::engine::request::{Request, Sampling};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Marks a token of the prompt that the text does not hold, in [`Adjuster::counts`].
const IN_PROMPT: u32 = u32::MAX;

/// Changes logits; holds only scratch memory, all of it as long as the vocabulary.
#[derive(Debug, Default)]
pub(super) struct Adjuster {
    logits: Vec<f32>,
    /// How often each token occurs in the text; all zero between calls.
    counts: Vec<u32>,
    /// A bit for each token that a constraint allows.
    allowed: Vec<u32>,
}

/// Whether the request asks for any change before the token at `position` is chosen.
pub(super) fn changes(request: &Request, position: u32) -> bool {
    let sampling = &request.sampling;
    request.constraint.is_some()
        || sampling.allowed_tokens.is_some()
        || !sampling.bad_words.is_empty()
        || !excluded_stops(request, position).is_empty()
        || !sampling.logit_bias.is_empty()
        || sampling.has_penalties()
}

/// Stop tokens that may not come yet.
fn excluded_stops(request: &Request, position: u32) -> &[u32] {
    let early = (position as usize) < request.prompt.len() + request.sampling.min_tokens;
    if early { &request.stop_tokens } else { &[] }
}

impl Adjuster {
    /// The logits to choose from: `logits` itself where the request changes nothing. Excluded tokens have negative
    /// infinity.
    pub fn adjust<'a>(
        &'a mut self,
        logits: &'a [f32],
        request: &Request,
        position: u32,
        generated: &[u32],
    ) -> Result<&'a [f32], RowError> {
        if !changes(request, position) {
            return Ok(logits);
        }
        let (sampling, stops) = (&request.sampling, excluded_stops(request, position));
        self.copy_allowed(logits, sampling.allowed_tokens.as_deref());
        self.constrain(request, position, generated)?;
        for word in &sampling.bad_words {
            let (&last, before) = word.split_last().expect("bad words are not empty");
            if generated.ends_with(before) {
                self.exclude(last);
            }
        }
        if !(request.constraint.is_some() && self.leaves_only(stops)) {
            stops.iter().for_each(|&token| self.exclude(token));
        }
        for &(token, bias) in &sampling.logit_bias {
            self.logits[token as usize] += bias;
        }
        if sampling.has_penalties() {
            self.penalize(sampling, &request.prompt, generated);
        }
        Ok(&self.logits)
    }

    fn copy_allowed(&mut self, logits: &[f32], allowed: Option<&[u32]>) {
        self.logits.clear();
        match allowed {
            None => self.logits.extend_from_slice(logits),
            Some(allowed) => {
                self.logits.resize(logits.len(), f32::NEG_INFINITY);
                for &token in allowed {
                    self.logits[token as usize] = logits[token as usize];
                }
            }
        }
    }

    fn exclude(&mut self, token: u32) {
        // A stop token beyond the vocabulary can never be chosen anyway.
        if let Some(logit) = self.logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }

    /// Nothing but these tokens can be chosen: a grammar is complete, which goes before `min_tokens`.
    fn leaves_only(&self, tokens: &[u32]) -> bool {
        let left = (0u32..).zip(&self.logits).filter(|&(_, &logit)| logit != f32::NEG_INFINITY);
        !tokens.is_empty() && left.into_iter().all(|(id, _)| tokens.contains(&id))
    }

    fn constrain(&mut self, request: &Request, position: u32, generated: &[u32]) -> Result<(), RowError> {
        let Some(constraint) = &request.constraint else { return Ok(()) };
        self.allowed.clear();
        self.allowed.resize(self.logits.len().div_ceil(32), u32::MAX);
        let restrict = AssertUnwindSafe(|| constraint.restrict(generated, &mut self.allowed));
        // A grammar is the client's: what it breaks must stay its own.
        let restricted = catch_unwind(restrict).unwrap_or_else(|_| Err("it panicked".into()));
        restricted.map_err(|why| RowError::Constraint { position, why })?;
        for (logits, word) in self.logits.chunks_mut(32).zip(&self.allowed) {
            for (bit, logit) in logits.iter_mut().enumerate() {
                *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
            }
        }
        Ok(())
    }

    /// Each token that occurs is changed once, in time that grows with the tokens so far and not with the vocabulary.
    fn penalize(&mut self, sampling: &Sampling, prompt: &[u32], generated: &[u32]) {
        self.counts.resize(self.logits.len(), 0);
        for &token in generated {
            self.counts[token as usize] += 1;
        }
        for &token in prompt {
            if self.counts[token as usize] == 0 {
                self.counts[token as usize] = IN_PROMPT;
                self.change(token, |logit| repeated(logit, sampling));
            }
        }
        for &token in generated {
            let count = std::mem::take(&mut self.counts[token as usize]);
            if count > 0 {
                self.change(token, |logit| {
                    repeated(logit, sampling)
                        - sampling.frequency_penalty * count as f32
                        - sampling.presence_penalty
                });
            }
        }
        for &token in prompt {
            self.counts[token as usize] = 0;
        }
    }

    /// What was excluded stays so; nothing else becomes infinite.
    fn change(&mut self, token: u32, penalty: impl Fn(f32) -> f32) {
        let logit = &mut self.logits[token as usize];
        if *logit != f32::NEG_INFINITY {
            *logit = penalty(*logit).clamp(f32::MIN, f32::MAX);
        }
    }
}

fn repeated(logit: f32, sampling: &Sampling) -> f32 {
    if logit > 0.0 { logit / sampling.repetition_penalty } else { logit * sampling.repetition_penalty }
}
