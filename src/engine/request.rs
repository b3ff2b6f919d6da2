//! What the outside asks of the engine and what comes back.

use crate::model::Routing;
use std::fmt;
use std::sync::Arc;

/// One sequence to continue.
#[derive(Debug, Clone)]
pub struct Request {
    /// Prompt tokens; never empty, each below the model's vocabulary size.
    pub prompt: Vec<u32>,
    /// Stop after this many generated tokens. 0 only computes the prompt.
    pub max_tokens: usize,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Tokens that end the text (EOS ids and `stop_token_ids`); the token itself is reported, then the request ends.
    pub stop_tokens: Vec<u32>,
    /// Report the log-probability of each generated token and of this many best ones.
    pub logprobs: Option<usize>,
    /// Report the same of each prompt token but the first, before the first generated one. Such a request does not read
    /// the prefix cache: only computing a position shows its logits.
    pub prompt_logprobs: Option<usize>,
    /// More than text: for `verify` and traces.
    pub capture: Capture,
    /// Lower goes first, under [`super::SchedulingPolicy::Priority`]; else it must be 0.
    pub priority: i32,
    /// Prefixes are shared only among requests with the same salt.
    pub cache_salt: Option<Arc<str>>,
    /// A grammar or another rule that knows which tokens may come next.
    pub constraint: Option<Arc<dyn Constraint>>,
}

impl Request {
    /// The most probable tokens after `prompt`, and nothing else.
    pub fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
        Request {
            prompt,
            max_tokens,
            sampling: Sampling::GREEDY,
            stop_tokens: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            capture: Capture::default(),
            priority: 0,
            cache_salt: None,
            constraint: None,
        }
    }

    /// Choosing a token takes the tokens before it, not only the logits.
    pub fn needs_history(&self) -> bool {
        self.constraint.is_some() || self.sampling.needs_history()
    }
}

/// How the next token is chosen from f32 logits; [`super::sampler`] has the order of the steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; ties go to the lowest id.
    pub temperature: f32,
    /// Keep the smallest set of best tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many best tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep tokens with at least this share of the best token's probability; 0 keeps all.
    pub min_p: f32,
    /// Logits of tokens in prompt or text are divided by this where positive, multiplied where negative; 1 is off.
    pub repetition_penalty: f32,
    /// Taken off the logits of tokens in the text; 0 is off.
    pub presence_penalty: f32,
    /// Taken off the logits of tokens in the text, once for each time they occur there; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; each occurs once.
    pub logit_bias: Vec<(u32, f32)>,
    /// Only these tokens are chosen; `None` allows all. Never empty.
    pub allowed_tokens: Option<Arc<[u32]>>,
    /// The text never holds one of these runs of tokens. None is empty.
    pub bad_words: Vec<Vec<u32>>,
    /// The first tokens, this many, are none of [`Request::stop_tokens`].
    pub min_tokens: usize,
    /// The token at position p is drawn from a generator seeded by (seed, p): the same seed gives the same text in any
    /// batch. Drawn at random by the caller when the user gave none.
    pub seed: u64,
}

impl Sampling {
    /// Always the most probable token.
    pub const GREEDY: Sampling = Sampling {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        allowed_tokens: None,
        bad_words: Vec::new(),
        min_tokens: 0,
        seed: 0,
    };

    /// Some token's chances depend on what was said before.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// See [`Request::needs_history`].
    fn needs_history(&self) -> bool {
        self.has_penalties() || !self.bad_words.is_empty()
    }
}

/// Says which tokens may come next, for text that must follow a grammar. Belongs to one sequence; called from the thread
/// of the rank that owns its rows, once for each token, with a history that grows by a token each time. After a preemption
/// the history goes on where it was.
pub trait Constraint: Send + Sync + fmt::Debug {
    /// Clears, in `allowed`, the bit of every token that must not follow `generated`: bit `id % 32` of word `id / 32`, all
    /// set before. Stop tokens are tokens like others. Clearing all bits ends the request with an error.
    ///
    /// # Errors
    /// What is wrong, which ends the request.
    fn restrict(&self, generated: &[u32], allowed: &mut [u32]) -> Result<(), String>;
}

/// Tensors a request wants to see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capture {
    /// Logits of every prompt position (else none are captured).
    pub prompt_logits: bool,
    /// Logits of the last prompt position.
    pub last_logits: bool,
    /// Expert choices of every computed position. Positions served from the prefix cache were not computed; a
    /// request that asks for these does not read the cache.
    pub routing: bool,
}

/// What a running request reports.
#[derive(Debug, Clone)]
pub enum Event {
    /// The prompt is computed; comes once, before the first token.
    Prompt(PromptEvent),
    /// One more token.
    Token(TokenEvent),
    /// The last event.
    Finished(Finished),
}

/// A computed prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptEvent {
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: usize,
    /// The prompt's tokens but the first, when [`Request::prompt_logprobs`] asked for them.
    pub scores: Vec<TokenEvent>,
}

/// One generated token, or one of the prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenEvent {
    /// Its id.
    pub token: u32,
    /// Its log-probability under the unmodified softmax, when asked for.
    pub logprob: Option<f32>,
    /// Its place among all tokens by that softmax, from 1; ties go to the lowest id. 0 when not asked for.
    pub rank: u32,
    /// The best tokens with their log-probabilities, best first, when asked for.
    pub top: Vec<(u32, f32)>,
}

/// How a request ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: usize,
    /// What [`Capture`] asked for.
    pub captured: Option<Box<Captured>>,
}

/// Why a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was generated.
    Stop,
    /// `max_tokens` or the context length was reached.
    Length,
    /// The caller left.
    Aborted,
    /// The engine or the request's constraint failed, or the model produced a non-finite logit; the text says which.
    Error(String),
    /// The request's own rules left no token to choose; the text says which and where.
    Refused(String),
}

/// Captured tensors.
#[derive(Debug, Clone, Default)]
pub struct Captured {
    /// `[prompt positions, vocab]`, or `[1, vocab]` when only the last was asked for.
    pub logits: Vec<f32>,
    /// Expert choices of positions 0.. in order: `[moe layers][positions][top_k]`.
    pub routing: Routing,
}
