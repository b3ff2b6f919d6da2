//! What the outside asks of the engine and what comes back.

use crate::model::Routing;

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
    /// Report the log-probability of each token and of this many best ones.
    pub logprobs: Option<usize>,
    /// More than text: for `verify`, prompt log-probabilities and traces.
    pub capture: Capture,
}

/// How the next token is chosen from f32 logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; ties go to the lowest id.
    pub temperature: f32,
    /// Keep the smallest set of best tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many best tokens; 0 keeps all.
    pub top_k: usize,
    /// The token at position p is drawn from a generator seeded by (seed, p): the same seed gives the same text in any
    /// batch. Drawn at random by the caller when the user gave none.
    pub seed: u64,
}

impl Sampling {
    /// Always the most probable token.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };
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
    /// One more token.
    Token(TokenEvent),
    /// The last event.
    Finished(Finished),
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenEvent {
    /// Its id.
    pub token: u32,
    /// Its log-probability under the unmodified softmax, when asked for.
    pub logprob: Option<f32>,
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
    /// The engine failed, or the model produced a non-finite logit; the text says which.
    Error(String),
}

/// Captured tensors.
#[derive(Debug, Clone, Default)]
pub struct Captured {
    /// `[prompt positions, vocab]`, or `[1, vocab]` when only the last was asked for.
    pub logits: Vec<f32>,
    /// Expert choices of positions 0.. in order: `[moe layers][positions][top_k]`.
    pub routing: Routing,
}
