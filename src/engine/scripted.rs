//! A model without weights: the second implementor of [`Model`], for tests of everything above it.
//!
//! Its logits are a hash of all tokens (and forms) before them, read through the block table from a fake KV cache that
//! remembers what was written where. So a continuation is a pure function of its sequence, any mix-up of blocks,
//! positions or forms changes it, and most are caught on the spot by an assertion.

mod brake;

use super::migration::Experts;
use super::options::{EngineOptions, SchedulingPolicy};
use super::rank::RankSetup;
use crate::backend::{Backend, DType, SeqSpan};
use crate::error::{Error, Result};
use crate::metrics::{RankMeter, Work, WorkClock};
use crate::model::{Batch, FormRules, Model, Routing, StepOutput};
use crate::moe::in_force::InForce;
use crate::moe::migrate::{Checksums, Slice, Switch, WHOLE};
pub use brake::Brake;
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Linear, Placement, PlacementPolicy};
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
#[derive(Debug, Clone)]
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
    /// Holds steps before they do anything.
    pub brake: Brake,
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
    /// The step with this number fails on a device.
    DeviceAt(u64),
    /// The step with this number finds its device full.
    MemoryAt(u64),
    /// The step with this number panics.
    PanicAt(u64),
    /// The step with this number never ends.
    HangAt(u64),
    /// Rows of this token have a NaN among their logits.
    NanAfter(u32),
    /// The slice of expert weights with this number, from 0, arrives damaged.
    DamageAt(u64),
    /// The slice of expert weights with this number cannot be copied.
    LoseAt(u64),
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
            brake: Brake::default(),
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
    experts: ScriptedExperts,
    /// Slices so far.
    slices: u64,
    /// Logits of the owned rows; `[owned logit rows, vocab]`.
    logits: Vec<f32>,
}

impl ScriptedModel {
    /// A fresh model of rank `rank`; `backend` only carries the logits, `meter` learns of its steps.
    pub fn new(
        script: Script,
        backend: Arc<dyn Backend>,
        meter: Arc<RankMeter>,
        (rank, placement): (usize, &Placement),
    ) -> Self {
        ScriptedModel {
            cache: ScriptedCache::new(script.clone()),
            script,
            backend,
            clock: WorkClock::new(meter),
            step: 0,
            histories: Vec::new(),
            experts: ScriptedExperts::new(rank, placement),
            slices: 0,
            logits: Vec::new(),
        }
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
        self.script.brake.pass();
        self.clock.start(Duration::ZERO);
        match self.script.fault {
            Fault::ErrorAt(at) if at == step => {
                return Err(Error::config("scripted model", format!("fails at step {step}")));
            }
            Fault::DeviceAt(at) if at == step => {
                let why = "a kernel: CUDA_ERROR_ILLEGAL_ADDRESS".to_owned();
                return Err(Error::Device { device: "cuda:1".to_owned(), why });
            }
            Fault::MemoryAt(at) if at == step => {
                let sum = "4096 bytes more > 512 available".to_owned();
                return Err(Error::Memory { device: "cuda:1".to_owned(), sum });
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

    fn transfer(&mut self, slice: &Slice) -> Result<Checksums> {
        let number = self.slices;
        self.slices += 1;
        if self.script.fault == Fault::LoseAt(number) {
            let why = format!("the scripted model loses slice {number}");
            return Err(Error::Device { device: format!("rank {}", self.experts.rank), why });
        }
        let mut sums = self.experts.transfer(slice);
        if self.script.fault == Fault::DamageAt(number) {
            sums.received = sums.received.map(|sum| !sum);
        }
        Ok(sums)
    }

    fn switch(&mut self, switch: &Switch) {
        self.experts.switch(switch);
    }
}

/// The fake weights of a rank: each slot remembers whose they are, and what should not happen is caught by an assertion.
struct ScriptedExperts {
    rank: usize,
    /// `[layers][slots]`
    held: Vec<Vec<i32>>,
    /// By staging place: the expert, and how much of it is there, in parts of [`WHOLE`].
    staged: Vec<(i32, u32)>,
}

impl ScriptedExperts {
    fn new(rank: usize, placement: &Placement) -> Self {
        let held = (0..placement.layers()).map(|l| placement.layer(l).slots_of_rank(rank).to_vec()).collect();
        ScriptedExperts { rank, held, staged: Vec::new() }
    }

    fn transfer(&mut self, slice: &Slice) -> Checksums {
        let mut sums = Checksums::default();
        for leg in slice.legs.iter() {
            let sum = (mix(leg.expert as u64) ^ mix(u64::from(slice.span.end))) as u32;
            if leg.from == self.rank {
                assert_eq!(self.held[leg.layer][leg.slot], leg.expert as i32, "{leg:?}");
                assert!(sums.sent.replace(sum).is_none(), "two legs leave rank {} in {slice:?}", self.rank);
            }
            if leg.to == self.rank {
                self.staged.resize(self.staged.len().max(leg.place + 1), (0, 0));
                let (expert, there) = &mut self.staged[leg.place];
                if slice.span.start == 0 {
                    (*expert, *there) = (leg.expert as i32, 0);
                }
                // After a gap nothing is worth anything: the switch will not find it whole.
                let follows = (*expert, *there) == (leg.expert as i32, slice.span.start);
                *there = if follows { slice.span.end } else { u32::MAX };
                assert!(sums.received.replace(sum).is_none(), "two legs reach rank {}", self.rank);
            }
        }
        sums
    }

    /// A multiset: a rank may deal what it holds to its slots as it likes.
    fn switch(&mut self, switch: &Switch) {
        for (layer, held) in self.held.iter_mut().enumerate() {
            let wanted = switch.placement.layer(layer).slots_of_rank(self.rank);
            let landed = switch.landed.iter().filter(|l| (l.layer, l.rank) == (layer, self.rank));
            for landed in landed {
                let (expert, there) = self.staged[landed.place];
                assert_eq!((expert, there), (wanted[landed.slot], WHOLE), "{landed:?}");
                held.push(expert);
            }
            for expert in wanted.iter().filter(|&&expert| expert >= 0) {
                let at = held.iter().position(|other| other == expert);
                held.swap_remove(at.unwrap_or_else(|| panic!("rank {} is to hold {wanted:?}", self.rank)));
            }
            held.clear();
            held.extend_from_slice(wanted);
        }
    }
}

/// Options of a small engine that runs the scripted model.
pub fn options() -> EngineOptions {
    EngineOptions {
        vocab_size: 60,
        experts: EXPERTS,
        max_model_len: 200,
        block_size: 4,
        kv_blocks: 100,
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        prefill_chunk_size: 16,
        max_logit_rows: 8,
        prefix_caching: true,
        form_rules: FormRules { generated: true, long_above: None },
        max_waiting: 100,
        max_waiting_tokens: 1 << 20,
        scheduling_policy: SchedulingPolicy::Arrival,
        step_timeout: Duration::from_secs(60),
    }
}

/// Where the scripted experts live on `ranks` ranks at the start, with so many redundant slots, movable through so many
/// staging places.
pub fn experts(ranks: usize, redundant: usize, staging_slots: usize) -> Experts {
    let placement = linear(ranks, redundant);
    Experts {
        in_force: Arc::new(InForce::new(Arc::new(placement))),
        staging_slots,
        expert_tp: 1,
        ranks_per_node: ranks,
        expert_bytes: 1 << 20,
        bandwidth: None,
    }
}

fn linear(ranks: usize, redundant: usize) -> Placement {
    let layers: Vec<usize> = (0..LAYERS).collect();
    let placed = Linear.place(&LoadWindow::new(&layers, EXPERTS), &ClusterShape { ranks, redundant });
    placed.expect("a few experts fit anywhere")
}

/// [`setups_with`] where nobody asks for experts.
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
    setups_with(script, (tp_size, dp_size), max_logit_rows, backend, &linear(tp_size * dp_size, 0))
}

/// Ranks that run `script`: `dp_size` groups of `tp_size` ranks each, for [`super::Engine::start`]. Each holds the experts
/// that `placement` gives it.
///
/// # Errors
/// When the backend has no room for the logits.
pub fn setups_with(
    script: &Script,
    (tp_size, dp_size): (usize, usize),
    max_logit_rows: usize,
    backend: &Arc<dyn Backend>,
    placement: &Placement,
) -> Result<Vec<RankSetup>> {
    let setup = |rank: usize| {
        let script = Script { owner: (rank % tp_size, tp_size), ..script.clone() };
        let logits = backend.alloc(DType::F32, max_logit_rows, script.vocab_size)?;
        let meter = Arc::new(RankMeter::default());
        Ok(RankSetup {
            model: Box::new(ScriptedModel::new(
                script,
                Arc::clone(backend),
                Arc::clone(&meter),
                (rank, placement),
            )),
            backend: Arc::clone(backend),
            output: StepOutput { logit_rows: Vec::new(), logits, routing: Routing::default() },
            dp_rank: rank / tp_size,
            meter,
        })
    };
    (0..tp_size * dp_size).map(setup).collect()
}
