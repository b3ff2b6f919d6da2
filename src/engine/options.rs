//! What an engine runs with. `config` derives it once from flags, model and devices.

use crate::error::{Error, Result};
use crate::model::FormRules;
use std::time::Duration;

/// Limits and sizes of one engine. "per DP rank" counts each data-parallel rank by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineOptions {
    /// Token ids of a request are below this; the width of a logit row.
    pub vocab_size: usize,
    /// Logical experts of a MoE layer; captured expert ids are below this.
    pub experts: usize,
    /// Longest sequence, prompt and generated tokens together.
    pub max_model_len: usize,
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks per DP rank.
    pub kv_blocks: usize,
    /// Sequences in one step, per DP rank.
    pub max_num_seqs: usize,
    /// Rows of one step, per DP rank; at least `max_num_seqs`.
    pub max_num_batched_tokens: usize,
    /// Prompt tokens of one sequence in one step.
    pub prefill_chunk_size: usize,
    /// Logit rows of one step, per DP rank; at least `max_num_seqs`. Only `Capture::prompt_logits` needs more than one
    /// per sequence.
    pub max_logit_rows: usize,
    /// Reuse the KV blocks of equal prefixes.
    pub prefix_caching: bool,
    /// Token forms the model distinguishes: part of the prefix-cache key.
    pub form_rules: FormRules,
    /// Requests that may wait; one more is refused with [`Error::Busy`].
    pub max_waiting: usize,
    /// Prompt tokens of all waiting requests; more are refused with [`Error::Busy`], unless nothing waits.
    pub max_waiting_tokens: usize,
    /// Who goes first.
    pub scheduling_policy: SchedulingPolicy,
    /// A step that takes this long beyond what such steps have taken counts as hung; the module `watchdog` says more.
    pub step_timeout: Duration,
}

/// Who goes first, and who is put back last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SchedulingPolicy {
    /// In order of arrival.
    #[default]
    Arrival,
    /// By [`super::request::Request::priority`], lower first, then in order of arrival.
    Priority,
}

impl EngineOptions {
    /// Refuses limits that are zero or contradict each other.
    ///
    /// # Errors
    /// [`Error::Config`] naming the first such limit by its flag.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("--max-model-len", self.max_model_len),
            ("--block-size", self.block_size),
            ("--kv-cache-memory", self.kv_blocks),
            ("--max-num-seqs", self.max_num_seqs),
            ("--prefill-chunk-size", self.prefill_chunk_size),
            ("--max-queued-requests", self.max_waiting),
            ("--max-queued-tokens", self.max_waiting_tokens),
        ];
        for (what, value) in positive {
            if value == 0 {
                return Err(Error::config(what, "must allow at least 1, is 0"));
            }
        }
        for (what, value) in [
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
            ("max_logit_rows", self.max_logit_rows),
        ] {
            if value < self.max_num_seqs {
                let seqs = self.max_num_seqs;
                return Err(Error::config(
                    what,
                    format!(
                        "is {value}, but every one of --max-num-seqs {seqs} sequences needs one per step"
                    ),
                ));
            }
        }
        // Rows, positions and blocks travel as u32.
        let tokens = self.kv_blocks.checked_mul(self.block_size);
        if tokens.is_none_or(|n| n > u32::MAX as usize) || self.max_model_len > u32::MAX as usize {
            return Err(Error::config(
                "--kv-cache-memory",
                format!(
                    "{} blocks of {} tokens (or --max-model-len {}) exceed {} tokens",
                    self.kv_blocks,
                    self.block_size,
                    self.max_model_len,
                    u32::MAX
                ),
            ));
        }
        Ok(())
    }

    /// Tokens the KV pool of one DP rank holds.
    pub fn kv_tokens(&self) -> usize {
        self.kv_blocks * self.block_size
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn options() -> EngineOptions {
        EngineOptions {
            vocab_size: 100,
            experts: 8,
            max_model_len: 64,
            block_size: 16,
            kv_blocks: 8,
            max_num_seqs: 4,
            max_num_batched_tokens: 32,
            prefill_chunk_size: 16,
            max_logit_rows: 4,
            prefix_caching: true,
            form_rules: FormRules::default(),
            max_waiting: 8,
            max_waiting_tokens: 1000,
            scheduling_policy: SchedulingPolicy::Arrival,
            step_timeout: Duration::from_secs(60),
        }
    }

    #[test]
    fn contradictions_are_named() {
        assert!(options().check().is_ok());
        type Break = fn(&mut EngineOptions);
        let cases: [(&str, Break); 6] = [
            ("--max-model-len", |o| o.max_model_len = 0),
            ("--kv-cache-memory", |o| o.kv_blocks = 0),
            ("--prefill-chunk-size", |o| o.prefill_chunk_size = 0),
            ("--max-num-batched-tokens", |o| o.max_num_batched_tokens = 3),
            ("max_logit_rows", |o| o.max_logit_rows = 3),
            ("--kv-cache-memory", |o| o.kv_blocks = usize::MAX / 2),
        ];
        for (name, spoil) in cases {
            let mut bad = options();
            spoil(&mut bad);
            let message = bad.check().unwrap_err().to_string();
            assert!(message.starts_with(name), "{name}: {message}");
        }
    }
}
