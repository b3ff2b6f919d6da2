//! What an engine counts, and who is told about durations.

use super::request::FinishReason;
use std::time::Duration;

/// KV blocks by state; `used + cached + free` is the size of the pools.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KvStats {
    /// Held by at least one running request.
    pub used: usize,
    /// Held by none, but kept for a request with the same prefix; given up when blocks are needed.
    pub cached: usize,
    /// Holding nothing.
    pub free: usize,
    /// Cached blocks given up so far.
    pub evictions: u64,
}

/// Ended requests by outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// A stop token was generated.
    pub stop: u64,
    /// The length limit was reached.
    pub length: u64,
    /// The caller left.
    pub aborted: u64,
    /// The engine or the model failed.
    pub error: u64,
    /// Never started: invalid, or the queue was full.
    pub rejected: u64,
}

impl Outcomes {
    /// Counts one more.
    pub fn count(&mut self, reason: &FinishReason) {
        match reason {
            FinishReason::Stop => self.stop += 1,
            FinishReason::Length => self.length += 1,
            FinishReason::Aborted => self.aborted += 1,
            FinishReason::Error(_) | FinishReason::Refused(_) => self.error += 1,
        }
    }
}

/// A snapshot of one engine, taken after its latest step. Counters start at zero with the engine and never fall.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Requests holding KV blocks.
    pub running: usize,
    /// Requests waiting for room, those preempted included.
    pub waiting: usize,
    /// Blocks of all DP ranks.
    pub kv: KvStats,
    /// Prompt tokens of admitted requests, cached ones included.
    pub prompt_tokens: u64,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u64,
    /// Tokens reported to callers.
    pub generated_tokens: u64,
    /// Tokens computed once more after a preemption.
    pub recomputed_tokens: u64,
    /// Requests put back for want of blocks.
    pub preemptions: u64,
    /// Logit rows with a NaN or an infinity.
    pub nonfinite_logits: u64,
    /// Forward passes.
    pub steps: u64,
    /// Ended requests.
    pub outcomes: Outcomes,
}

/// Duration and size of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepTiming {
    /// From the dispatch to the last rank's results.
    pub duration: Duration,
    /// Rows that computed prompts (or recomputed after a preemption), all DP ranks.
    pub prefill_rows: usize,
    /// Rows that continued a text by one token, all DP ranks.
    pub decode_rows: usize,
}

/// The life of one request in durations. Times that were never reached are absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestTiming {
    /// From submission to admission.
    pub queue: Option<Duration>,
    /// From admission to the first token.
    pub prefill: Option<Duration>,
    /// From the first token to the end.
    pub decode: Option<Duration>,
    /// From submission to the end.
    pub total: Duration,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
    /// How it ended.
    pub reason: FinishReason,
}

/// Told about durations from the engine thread, which waits meanwhile: implementations count and return.
pub trait TimingObserver: Send + Sync {
    /// A step has ended.
    fn on_step(&self, timing: &StepTiming);
    /// The first token of a request came this long after its submission.
    fn on_first_token(&self, since_submission: Duration);
    /// Another token of a request came this long after the one before it.
    fn on_next_token(&self, since_previous: Duration);
    /// A request has ended.
    fn on_finish(&self, timing: &RequestTiming);
}
