//! One request on its way through the scheduler: its tokens, how far they are computed, and its blocks.

use super::RequestId;
use super::kv_blocks::{BlockTable, CachedPrefix, KvPool, TokenRun};
use super::plan::RowTask;
use super::request::{Captured, FinishReason, Finished, PromptEvent, Request, TokenEvent};
use crate::backend::SeqSpan;
use crate::model::{FormRules, Routing};
use std::sync::Arc;

/// A request with its progress.
pub(super) struct Sequence {
    /// Counts up in the order of arrival.
    pub id: RequestId,
    request: Arc<Request>,
    rules: FormRules,
    /// Prompt, then generated tokens.
    tokens: Vec<u32>,
    /// Leading tokens in the KV cache.
    computed: usize,
    /// Leading tokens that were ever computed by this request; those beyond `computed` are recomputed.
    reached: usize,
    /// Prompt tokens found in the prefix cache when it was admitted first.
    cached_tokens: Option<usize>,
    /// Present while running.
    table: Option<BlockTable>,
    /// Captured logit rows, one after another.
    logits: Vec<f32>,
    /// Prompt positions whose logits are captured.
    logit_positions: usize,
    /// Log-probabilities of the prompt's tokens from the second on, as far as they are known.
    prompt_scores: Vec<TokenEvent>,
    /// They, and that the prompt is computed, have been told.
    prompt_told: bool,
    routing: RoutingCapture,
}

impl Sequence {
    pub fn new(id: RequestId, request: Arc<Request>, rules: FormRules) -> Self {
        let tokens = request.prompt.clone();
        Sequence {
            id,
            request,
            rules,
            tokens,
            computed: 0,
            reached: 0,
            cached_tokens: None,
            table: None,
            logits: Vec::new(),
            logit_positions: 0,
            prompt_scores: Vec::new(),
            prompt_told: false,
            routing: RoutingCapture::default(),
        }
    }

    /// Its place among others: lower goes first.
    pub fn order(&self) -> (i32, RequestId) {
        (self.request.priority, self.id)
    }

    pub fn request(&self) -> &Arc<Request> {
        &self.request
    }

    /// Tokens known so far.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    /// Leading tokens in the KV cache.
    pub fn computed_tokens(&self) -> usize {
        self.computed
    }

    /// Known tokens that are not in the KV cache.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Prompt tokens found in the prefix cache when it was admitted first.
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens.unwrap_or(0)
    }

    /// Of `rows` tokens from `position` on, those that were computed before a preemption.
    pub fn recomputed(&self, position: usize, rows: usize) -> usize {
        self.reached.saturating_sub(position).min(rows)
    }

    /// Its blocks.
    ///
    /// # Panics
    /// When it waits: a waiting sequence has none.
    pub fn table(&self) -> &BlockTable {
        self.table.as_ref().expect("a running sequence has a block table")
    }

    // ---- blocks

    /// All known tokens.
    fn run(&self) -> TokenRun<'_> {
        self.run_of(self.tokens.len())
    }

    /// The first `tokens` tokens.
    fn run_of(&self, tokens: usize) -> TokenRun<'_> {
        TokenRun {
            tokens: &self.tokens[..tokens],
            prompt_len: self.prompt_len(),
            rules: self.rules,
            salt: self.request.cache_salt.as_ref(),
        }
    }

    /// `leader`, which runs, is about to compute a block of its prompt that this one could share.
    pub fn follows(&self, leader: &Sequence, block_size: usize) -> bool {
        let start = leader.computed / block_size * block_size;
        let end = start + block_size;
        let shared = end <= self.readable().min(self.prompt_len()).min(leader.prompt_len());
        shared
            && self.request.cache_salt == leader.request.cache_salt
            && self.rules.of(0, self.prompt_len()) == self.rules.of(0, leader.prompt_len())
            // What comes next tells most others apart.
            && self.tokens[start..end] == leader.tokens[start..end]
            && self.tokens[..start] == leader.tokens[..start]
    }

    /// Blocks it would find computed in this pool.
    pub fn cached_prefix(&self, pool: &KvPool) -> CachedPrefix {
        pool.cached_prefix(self.run(), self.readable())
    }

    /// Tokens it may take from the prefix cache. The newest is always computed, for its logits; so is every one of a
    /// request that captures what only computing shows.
    fn readable(&self) -> usize {
        let Request { capture, prompt_logprobs, .. } = &*self.request;
        let all = capture.prompt_logits || capture.routing || prompt_logprobs.is_some();
        if all { 0 } else { self.tokens.len() - 1 }
    }

    /// Takes blocks for all known tokens, cached ones first; the caller has checked that there are enough. Returns
    /// whether this is its first admission.
    pub fn admit(&mut self, pool: &KvPool) -> bool {
        let mut table = pool.open(self.run(), self.readable());
        self.computed = table.blocks().len() * pool.block_size();
        assert!(table.grow(self.tokens.len()), "request {} was admitted without room", self.id);
        self.table = Some(table);
        let first_time = self.cached_tokens.is_none();
        self.cached_tokens.get_or_insert(self.computed);
        first_time
    }

    /// Makes room for all known tokens; `false` when the pool has no block left.
    pub fn grow(&mut self) -> bool {
        let tokens = self.tokens.len();
        self.table.as_mut().expect("a running sequence has a block table").grow(tokens)
    }

    /// Gives its blocks back; its tokens stay.
    pub fn preempt(mut self) -> Self {
        self.table = None;
        self.computed = 0;
        self
    }

    /// The first `tokens` tokens are in the KV cache now.
    pub fn advance_to(&mut self, tokens: usize) {
        self.computed = tokens;
        self.reached = self.reached.max(tokens);
        let mut table = self.table.take().expect("a running sequence has a block table");
        table.publish(self.run_of(tokens));
        self.table = Some(table);
    }

    // ---- logits

    /// A token is sampled from the logits at `position`: it is the newest, and another one is wanted.
    pub fn samples_at(&self, position: usize) -> bool {
        position + 1 == self.tokens.len() && self.generated().len() < self.request.max_tokens
    }

    /// The logits at `position` are captured (once: recomputing does not repeat it).
    pub fn captures_logits_at(&self, position: usize) -> bool {
        let capture = self.request.capture;
        let wanted = capture.prompt_logits || (capture.last_logits && position + 1 == self.prompt_len());
        wanted && position < self.prompt_len() && position >= self.logit_positions
    }

    /// What is to be known about the token after `position`.
    pub fn task_at(&self, position: usize) -> RowTask {
        if self.samples_at(position) {
            return RowTask::Sample;
        }
        // Once: recomputing does not repeat it.
        let unscored = self.request.prompt_logprobs.is_some() && position >= self.prompt_scores.len();
        match self.request.prompt.get(position + 1) {
            Some(&token) if unscored => RowTask::Score(token),
            _ => RowTask::Nothing,
        }
    }

    /// Takes the score of the next prompt token.
    pub fn take_score(&mut self, score: TokenEvent) {
        self.prompt_scores.push(score);
    }

    /// What is to be told about the prompt, the first time this is asked.
    pub fn take_prompt_event(&mut self) -> Option<PromptEvent> {
        if std::mem::replace(&mut self.prompt_told, true) {
            return None;
        }
        Some(PromptEvent { cached_tokens: self.cached_tokens(), scores: self.prompt_scores.clone() })
    }

    /// Takes the logits of the next captured position.
    pub fn take_logits(&mut self, logits: &[f32]) {
        self.logits.extend_from_slice(logits);
        self.logit_positions =
            if self.request.capture.prompt_logits { self.logit_positions + 1 } else { self.prompt_len() };
    }

    /// Keeps the expert choices of the rows that `piece` and this sequence's `span` have in common.
    pub fn take_routing(&mut self, span: &SeqSpan, piece: &Routing) {
        if self.request.capture.routing {
            self.routing.take(span, piece);
        }
    }

    // ---- tokens

    /// The text so far.
    pub fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt_len()..]
    }

    /// Appends a generated token; the reason when it is the last.
    pub fn push(&mut self, token: u32) -> Option<FinishReason> {
        self.tokens.push(token);
        if self.request.stop_tokens.contains(&token) {
            Some(FinishReason::Stop)
        } else {
            (self.generated().len() >= self.request.max_tokens).then_some(FinishReason::Length)
        }
    }

    /// The last event; the blocks go back with `self`.
    pub fn finish(self, reason: FinishReason) -> Finished {
        let cached_tokens = self.cached_tokens();
        let captured = (self.request.capture != Default::default())
            .then(|| Box::new(Captured { logits: self.logits, routing: self.routing.finish() }));
        Finished { reason, cached_tokens, captured }
    }
}

/// Expert choices by position.
#[derive(Default)]
struct RoutingCapture {
    layers: usize,
    top_k: usize,
    /// `[positions][layers][top_k]`: ids and weights of each computed position.
    choices: Vec<(u32, f32)>,
}

impl RoutingCapture {
    fn take(&mut self, span: &SeqSpan, piece: &Routing) {
        let start = (span.row as usize).max(piece.first_row);
        let end = ((span.row + span.rows) as usize).min(piece.first_row + piece.rows);
        if start >= end || piece.top_k == 0 {
            return;
        }
        self.top_k = piece.top_k;
        self.layers = piece.ids.len() / (piece.rows * piece.top_k);
        let width = self.layers * self.top_k;
        for row in start..end {
            let position = span.position as usize + row - span.row as usize;
            // Recomputing gives the same choices, so overwriting them changes nothing.
            self.choices.resize(self.choices.len().max((position + 1) * width), (u32::MAX, 0.0));
            let choices = self.choices[position * width..].chunks_exact_mut(self.top_k);
            for (layer, choices) in choices.take(self.layers).enumerate() {
                let at = (layer * piece.rows + row - piece.first_row) * piece.top_k;
                for (k, choice) in choices.iter_mut().enumerate() {
                    *choice = (piece.ids[at + k], piece.weights[at + k]);
                }
            }
        }
    }

    /// As `[layers][positions][top_k]`.
    fn finish(self) -> Routing {
        let RoutingCapture { layers, top_k, choices } = self;
        let rows = choices.len().checked_div(layers * top_k).unwrap_or(0);
        let mut routing = Routing { first_row: 0, rows, top_k, ids: vec![], weights: vec![] };
        for layer in 0..layers {
            for position in 0..rows {
                let at = (position * layers + layer) * top_k;
                routing.ids.extend(choices[at..at + top_k].iter().map(|choice| choice.0));
                routing.weights.extend(choices[at..at + top_k].iter().map(|choice| choice.1));
            }
        }
        routing
    }
}
