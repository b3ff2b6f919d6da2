//! A model without weights: the second implementor of [`Model`], for tests of everything above it.
//!
//! Its logits are a hash of all tokens (and forms) before them, read through the block table from a fake KV cache that
//! remembers what was written where. So a continuation is a pure function of its sequence, any mix-up of blocks,
//! positions or forms changes it, and most are caught on the spot by an assertion.

use super::options::EngineOptions;
use super::rank::RankSetup;
use crate::backend::{Backend, DType, SeqSpan};
use crate::error::{Error, Result};
use crate::metrics::{RankMeter, Work, WorkClock};
use crate::model::{Batch, FormRules, Model, Routing, StepOutput};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// MoE layers of the made-up routing.
pub const LAYERS: usize = 2;
/// Experts of the made-up routing.
pub const EXPERTS: usize = 8;
/// Experts per token of the made-up routing.
pub const TOP_K: usize = 2;

/// What the scripted model pretends to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Script {
    /// Width of a logit row.
    pub vocab_size: usize,
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks.
    pub blocks: usize,
    /// Forms that matter.
    pub rules: FormRules,
    /// Place in the tensor-parallel group, and its size: which rows are owned.
    pub owner: (usize, usize),
    /// Every step takes at least this long.
    pub pause: Duration,
    /// What goes wrong.
    pub fault: Fault,
}

/// Something that goes wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// The step with this number fails.
    ErrorAt(u64),
    /// The step with this number panics.
    PanicAt(u64),
    /// The step with this number never ends.
    HangAt(u64),
    /// Rows of this token have a NaN among their logits.
    NanAfter(u32),
}

impl Script {
    /// A model that fits an engine's options, on one rank, without faults.
    pub fn of(options: &EngineOptions) -> Self {
        Script {
            vocab_size: options.vocab_size,
            block_size: options.block_size,
            blocks: options.kv_blocks,
            rules: options.form_rules,
            owner: (0, 1),
            pause: Duration::ZERO,
            fault: Fault::None,
        }
    }

    /// What greedy sampling generates after `prompt`: computed from the definition, without cache or batch.
    pub fn greedy(&self, prompt: &[u32], tokens: usize) -> Vec<u32> {
        let mut sequence = prompt.to_vec();
        let mut logits = vec![0.0; self.vocab_size];
        for _ in 0..tokens {
            let history = self.history(&sequence, prompt.len());
            self.fill_logits(history, sequence[sequence.len() - 1], &mut logits);
            let best =
                (0..self.vocab_size).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
            sequence.push(best as u32);
        }
        sequence.split_off(prompt.len())
    }

    /// Hash of a whole sequence.
    pub fn history(&self, sequence: &[u32], prompt_len: usize) -> u64 {
        let tokens = sequence.iter().enumerate();
        tokens.fold(0, |history, (p, &token)| self.extend(history, token, p, prompt_len))
    }

    /// Hash of a sequence that is longer by one token.
    fn extend(&self, history: u64, token: u32, position: usize, prompt_len: usize) -> u64 {
        let form = self.rules.of(position, prompt_len);
        let form = u64::from(form.generated) << 32 | u64::from(form.long) << 33;
        mix(history ^ mix(u64::from(token) | form))
    }

    /// Logits of a row with this history and token: values in [0, 8) with ties now and then.
    pub fn fill_logits(&self, history: u64, token: u32, out: &mut [f32]) {
        for (id, logit) in out.iter_mut().enumerate() {
            *logit = (mix(history.wrapping_add(id as u64)) % 1024) as f32 / 128.0;
        }
        if self.fault == Fault::NanAfter(token) {
            out[self.vocab_size / 2] = f32::NAN;
        }
    }

    /// Experts that a row with this history is routed to: `TOP_K` different ones.
    pub fn experts(history: u64, layer: usize) -> [u32; TOP_K] {
        let choice = mix(history.wrapping_add(layer as u64)) % (EXPERTS * (EXPERTS - 1)) as u64;
        let first = choice % EXPERTS as u64;
        let second = (first + 1 + choice / EXPERTS as u64) % EXPERTS as u64;
        [first as u32, second as u32]
    }
}

/// SplitMix64's finalizer (Steele, Lea, Flood 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// One slot of the fake cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    token: u32,
    position: u32,
    /// Hash of the sequence up to and including this token.
    history: u64,
}

/// The fake KV cache: what was written to each slot of each block.
#[derive(Debug)]
pub struct ScriptedCache {
    script: Script,
    entries: Vec<Option<Entry>>,
}

impl ScriptedCache {
    /// An empty cache.
    pub fn new(script: Script) -> Self {
        let slots = script.blocks * script.block_size;
        ScriptedCache { script, entries: vec![None; slots] }
    }

    /// Writes the tokens of every span and puts each row's history into `histories`.
    ///
    /// # Panics
    /// When a span attends to a slot that holds something else than this sequence's token at that position.
    pub fn forward(&mut self, batch: &Batch<'_>, histories: &mut Vec<u64>) {
        histories.clear();
        for span in batch.attention.spans {
            let blocks = &batch.attention.block_table[span.first_block as usize..];
            let mut history = self.check_past(span, blocks);
            let rows = span.row as usize..(span.row + span.rows) as usize;
            for (i, &token) in batch.tokens[rows].iter().enumerate() {
                let position = span.position as usize + i;
                history = self.script.extend(history, token, position, span.prompt_len as usize);
                let slot = self.slot(blocks, position);
                self.entries[slot] = Some(Entry { token, position: position as u32, history });
                histories.push(history);
            }
        }
    }

    /// Follows the chain of everything before a span; returns its history.
    fn check_past(&self, span: &SeqSpan, blocks: &[u32]) -> u64 {
        let mut history = 0;
        for position in 0..span.position as usize {
            let slot = self.slot(blocks, position);
            let Some(entry) = self.entries[slot] else {
                panic!("position {position} (slot {slot}) is attended to before it was written");
            };
            history = self.script.extend(history, entry.token, position, span.prompt_len as usize);
            assert_eq!(entry.position as usize, position, "slot {slot} holds another position");
            assert_eq!(
                entry.history, history,
                "slot {slot} was written by another sequence or in another form"
            );
        }
        history
    }

    fn slot(&self, blocks: &[u32], position: usize) -> usize {
        let size = self.script.block_size;
        blocks[position / size] as usize * size + position % size
    }
}

/// A rank of the scripted model.
pub struct ScriptedModel {
    script: Script,
    cache: ScriptedCache,
    backend: Arc<dyn Backend>,
    clock: WorkClock,
    step: u64,
    histories: Vec<u64>,
    /// Logits of the owned rows; `[owned logit rows, vocab]`.
    logits: Vec<f32>,
}

impl ScriptedModel {
    /// A fresh model; `backend` only carries the logits, `meter` learns of its steps.
    pub fn new(script: Script, backend: Arc<dyn Backend>, meter: Arc<RankMeter>) -> Self {
        let cache = ScriptedCache::new(script.clone());
        let clock = WorkClock::new(meter);
        ScriptedModel { script, cache, backend, clock, step: 0, histories: Vec::new(), logits: Vec::new() }
    }

    /// The rows of a batch of `rows` that this rank owns: shares of consecutive rows, the first ones larger.
    fn owned(&self, rows: usize) -> Range<usize> {
        let (index, size) = self.script.owner;
        let start = |r: usize| r * (rows / size) + r.min(rows % size);
        start(index)..start(index + 1)
    }

    fn fill_logits(&mut self, batch: &Batch<'_>, owned: &Range<usize>, out: &mut StepOutput) -> Result<()> {
        let vocab = self.script.vocab_size;
        out.logit_rows.clear();
        out.logit_rows.extend(batch.logit_rows.iter().filter(|&&row| owned.contains(&(row as usize))));
        self.logits.resize(out.logit_rows.len() * vocab, 0.0);
        for (&row, logits) in out.logit_rows.iter().zip(self.logits.chunks_exact_mut(vocab)) {
            self.script.fill_logits(self.histories[row as usize], batch.tokens[row as usize], logits);
        }
        let rows = out.logit_rows.len();
        self.backend.upload(bytemuck::cast_slice(&self.logits), out.logits.head_mut(rows))
    }

    fn fill_routing(&self, owned: &Range<usize>, routing: &mut Routing) {
        routing.first_row = owned.start;
        routing.rows = owned.len();
        routing.top_k = TOP_K;
        routing.ids.clear();
        for layer in 0..LAYERS {
            let histories = &self.histories[owned.clone()];
            routing.ids.extend(histories.iter().flat_map(|&history| Script::experts(history, layer)));
        }
        routing.weights.clear();
        routing.weights.resize(routing.ids.len(), 1.0 / TOP_K as f32);
    }
}

impl Model for ScriptedModel {
    fn forward(&mut self, batch: &Batch<'_>, out: &mut StepOutput) -> Result<()> {
        let step = self.step;
        self.step += 1;
        self.clock.start(Duration::ZERO);
        match self.script.fault {
            Fault::ErrorAt(at) if at == step => {
                return Err(Error::config("scripted model", format!("fails at step {step}")));
            }
            Fault::PanicAt(at) if at == step => panic!("the scripted model panics at step {step}"),
            Fault::HangAt(at) if at == step => loop {
                std::thread::park();
            },
            _ => {}
        }
        if !self.script.pause.is_zero() {
            std::thread::sleep(self.script.pause);
        }
        let mut histories = std::mem::take(&mut self.histories);
        self.cache.forward(batch, &mut histories);
        self.histories = histories;

        let owned = self.owned(batch.tokens.len());
        self.fill_logits(batch, &owned, out)?;
        if batch.want_routing {
            self.fill_routing(&owned, &mut out.routing);
        }
        self.clock.lap(Work::Dense, Duration::ZERO);
        Ok(())
    }
}

/// Ranks that run `script`: `dp_size` groups of `tp_size` ranks each, for [`super::Engine::start`].
///
/// # Errors
/// When the backend has no room for the logits.
pub fn setups(
    script: &Script,
    tp_size: usize,
    dp_size: usize,
    max_logit_rows: usize,
    backend: &Arc<dyn Backend>,
) -> Result<Vec<RankSetup>> {
    let setup = |rank: usize| {
        let script = Script { owner: (rank % tp_size, tp_size), ..script.clone() };
        let logits = backend.alloc(DType::F32, max_logit_rows, script.vocab_size)?;
        let meter = Arc::new(RankMeter::default());
        Ok(RankSetup {
            model: Box::new(ScriptedModel::new(script, Arc::clone(backend), Arc::clone(&meter))),
            backend: Arc::clone(backend),
            output: StepOutput { logit_rows: Vec::new(), logits, routing: Routing::default() },
            dp_rank: rank / tp_size,
            meter,
        })
    };
    (0..tp_size * dp_size).map(setup).collect()
}
