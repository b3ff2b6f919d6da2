//! A checkpoint loaded on one rank and driven step by step, without the engine around it: what the model itself takes.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use moeyard::Result;
use moeyard::backend::cpu::CpuBackend;
use moeyard::backend::{AttentionBatch, Backend, Precision, SeqSpan};
use moeyard::cli::model::OpenModel;
use moeyard::comm::Transport;
use moeyard::model::load::Sizes;
use moeyard::model::world::{Degrees, WorldOptions, load_world};
use moeyard::model::{Batch, Model, StepOutput};
use moeyard::moe::load::LoadCounters;
use moeyard::spec::ModelSpec;
use moeyard::weights::WeightReader;
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Linear, PlacementPolicy};
use router_sim::split::Split;

/// Tokens per KV block.
const BLOCK: usize = 32;

/// A loaded model with room for some sequences.
pub struct Workload {
    /// What the model is.
    pub spec: ModelSpec,
    /// In which types it computes.
    pub precision: Precision,
    /// Where it runs.
    pub backend: Arc<CpuBackend>,
    model: Box<dyn Model>,
    output: StepOutput,
    blocks_per_sequence: usize,
    random: u32,
}

/// What a run computes: `sequences` sequences of which `before` tokens are in the cache already, and `rows` more of each.
#[derive(Clone, Copy)]
pub struct Step {
    /// Sequences in the batch.
    pub sequences: usize,
    /// Tokens of each that are there.
    pub before: usize,
    /// Tokens of each that join.
    pub rows: usize,
}

impl Workload {
    /// Loads a checkpoint, with room for `sequences` sequences of `tokens` tokens, and for a prompt.
    pub fn load(
        folder: &Path,
        precision: Precision,
        threads: usize,
        sequences: usize,
        tokens: usize,
        prompt: usize,
    ) -> Result<Workload> {
        let OpenModel { checkpoint, family, .. } = OpenModel::open(Some(folder))?;
        let spec = family.spec;
        let backend = Arc::new(CpuBackend::detect(threads)?);
        let layers = spec.moe_layers();
        let shape = ClusterShape { ranks: 1, redundant: 0 };
        let placement = Arc::new(Linear.place(&LoadWindow::new(&layers, spec.moe.experts), &shape)?);
        let blocks_per_sequence = tokens.div_ceil(BLOCK);
        let options = WorldOptions {
            counters: vec![Arc::new(LoadCounters::new(&placement))],
            transport: Transport::Local,
            degrees: Degrees::SOLO,
            precision,
            placement,
            split: Split::Exact,
            sizes: Sizes {
                max_model_len: tokens.max(prompt),
                block_size: BLOCK,
                kv_blocks: (sequences * blocks_per_sequence).max(prompt.div_ceil(BLOCK)),
                max_rows: prompt.max(sequences),
                max_logit_rows: sequences,
                staging_slots: 0,
            },
        };
        let reader = WeightReader::new(&checkpoint, &spec, &family.names, options.precision.weights);
        let device = Arc::clone(&backend) as Arc<dyn Backend>;
        let mut ranks = load_world(reader, &spec, vec![device], &options)?;
        let rank = ranks.pop().expect("one backend makes one rank");
        let model = Box::new(rank.model);
        Ok(Workload { spec, precision, backend, model, output: rank.output, blocks_per_sequence, random: 1 })
    }

    /// Seconds of one step on random tokens. Wants the logits of the last row of each sequence, as a server does.
    pub fn seconds(&mut self, step: Step) -> Result<f64> {
        self.run(step, false)
    }

    /// Runs one step and counts how many rows met each expert, for every layer's experts that any met.
    pub fn rows_of_experts(&mut self, step: Step) -> Result<Vec<usize>> {
        self.run(step, true)?;
        let routing = &self.output.routing;
        let per_layer = routing.ids.chunks(routing.rows * routing.top_k);
        let counts = |ids: &[u32]| {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            ids.chunk_by(|a, b| a == b).map(<[u32]>::len).collect::<Vec<_>>()
        };
        Ok(per_layer.flat_map(counts).collect())
    }

    fn run(&mut self, step: Step, want_routing: bool) -> Result<f64> {
        let Step { sequences, before, rows } = step;
        let vocab = self.spec.vocab_size as u32;
        let tokens: Vec<u32> = (0..sequences * rows).map(|_| self.next_random() % vocab).collect();
        let span = |sequence: usize| SeqSpan {
            row: (sequence * rows) as u32,
            rows: rows as u32,
            position: before as u32,
            // A single token is a generated one.
            prompt_len: if rows == 1 { before } else { before + rows } as u32,
            first_block: (sequence * self.blocks_per_sequence) as u32,
        };
        let spans: Vec<SeqSpan> = (0..sequences).map(span).collect();
        let blocks = (sequences * self.blocks_per_sequence).max((before + rows).div_ceil(BLOCK));
        let block_table: Vec<u32> = (0..blocks as u32).collect();
        let logit_rows: Vec<u32> = spans.iter().map(|span| span.row + span.rows - 1).collect();
        let batch = Batch {
            tokens: &tokens,
            attention: AttentionBatch { spans: &spans, block_table: &block_table },
            logit_rows: &logit_rows,
            want_routing,
        };
        let start = Instant::now();
        self.model.forward(&batch, &mut self.output)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// A linear congruential generator (Numerical Recipes), its upper bits.
    fn next_random(&mut self) -> u32 {
        self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.random >> 8
    }
}
