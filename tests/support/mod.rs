//! What black-box tests share: a model on several ranks driven step by step, and golden files.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod launch;
pub mod reading;
pub mod rounded;

use std::path::Path;
use std::sync::Arc;

use moeyard::backend::cpu::CpuBackend;
use moeyard::backend::{AttentionBatch, Backend, DType, Precision, SeqSpan};
use moeyard::comm::Transport;
use moeyard::engine::RankSetup;
use moeyard::metrics::{LoadSnapshot, LoadSource};
use moeyard::model::families::{self, Family};
use moeyard::model::load::Sizes;
use moeyard::model::transformer::Transformer;
use moeyard::model::world::{Degrees, LoadedRank, WorldOptions, load_world};
use moeyard::model::{Batch, Model, Routing};
use moeyard::moe::in_force::InForce;
use moeyard::moe::load::{LoadCounters, WorldLoad};
use moeyard::weights::{Checkpoint, WeightReader, validate};
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Linear, Placement, PlacementPolicy};
use router_sim::split::Split;

pub mod draws;
pub mod fixtures;
pub mod numbers;
pub mod patience;
pub mod placements;
pub mod threads;

pub use fixtures::model_dir;
use threads::on_threads;

/// Tokens per KV block in these tests.
pub const BLOCK: usize = 16;

/// How to run a model.
#[derive(Clone)]
pub struct Setup {
    pub dtype: DType,
    pub degrees: Degrees,
    pub redundant: usize,
    pub placement: Option<Placement>,
    pub backend: Arc<dyn Fn() -> Arc<dyn Backend>>,
    pub max_model_len: usize,
    pub split: Split,
    pub staging_slots: usize,
    /// Type of the experts' weights, where it is not that of the others.
    pub experts: Option<DType>,
}

impl Setup {
    /// One rank on the CPU backend with the best instruction set and one thread.
    pub fn solo(dtype: DType) -> Setup {
        Setup {
            dtype,
            degrees: Degrees::SOLO,
            redundant: 0,
            placement: None,
            backend: cpu(1),
            max_model_len: 256,
            split: Split::Exact,
            staging_slots: 0,
            experts: None,
        }
    }

    /// `ep` ranks with DP attention.
    pub fn expert_parallel(dtype: DType, ep: usize) -> Setup {
        let degrees = Degrees { tensor_parallel: 1, data_parallel: ep, expert_tp: 1 };
        Setup { degrees, ..Setup::solo(dtype) }
    }
}

/// Makes CPU backends with the best instruction set and this many threads.
pub fn cpu(threads: usize) -> Arc<dyn Fn() -> Arc<dyn Backend>> {
    Arc::new(move || Arc::new(CpuBackend::detect(threads).unwrap()))
}

/// A sequence under test: its tokens so far are in the cache.
pub struct Sequence {
    pub prompt_len: usize,
    pub tokens: Vec<u32>,
    pub cached: usize,
    blocks: Vec<u32>,
}

/// A model on all its ranks, one data-parallel group's batch at a time (other groups are idle).
pub struct World {
    pub family: Family,
    ranks: Vec<LoadedRank>,
    pub counters: Vec<Arc<LoadCounters>>,
    placement: Arc<Placement>,
    degrees: Degrees,
    next_block: u32,
    blocks: u32,
}

/// Rows of one step with everything the ranks reported, in row order.
pub struct Stepped {
    /// `[logit rows][vocab]`
    pub logits: Vec<Vec<f32>>,
    pub routing: Routing,
}

impl World {
    pub fn load(dir: &Path, setup: &Setup) -> World {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let config = checkpoint.text("config.json").unwrap().unwrap();
        let family = families::resolve(&config).unwrap();
        validate(&checkpoint, &family.spec, &family.names).unwrap();
        let layers = family.spec.moe_layers();
        let placement = setup.placement.clone().unwrap_or_else(|| {
            let shape = ClusterShape { ranks: setup.degrees.expert_parallel(), redundant: setup.redundant };
            Linear.place(&LoadWindow::new(&layers, family.spec.moe.experts), &shape).unwrap()
        });
        let placement = Arc::new(placement);
        let blocks = 64 * setup.max_model_len.div_ceil(BLOCK).max(1);
        let counters: Vec<_> =
            (0..setup.degrees.world()).map(|_| Arc::new(LoadCounters::new(&placement))).collect();
        let mut precision = Precision::of(setup.dtype, &family.spec.moe.router);
        if let Some(experts) = setup.experts {
            precision = precision.with_experts(experts);
        }
        let options = WorldOptions {
            counters: counters.clone(),
            degrees: setup.degrees,
            transport: Transport::Local,
            precision,
            placement: Arc::clone(&placement),
            sizes: Sizes {
                max_model_len: setup.max_model_len,
                block_size: BLOCK,
                kv_blocks: blocks,
                max_rows: 2048,
                max_logit_rows: 512,
                staging_slots: setup.staging_slots,
            },
            split: setup.split,
        };
        let backends = (0..setup.degrees.world()).map(|_| (setup.backend)()).collect();
        let reader = WeightReader::new(&checkpoint, &family.spec, &family.names, precision.weights);
        let ranks = load_world(reader, &family.spec, backends, &options).unwrap();
        let (degrees, blocks) = (setup.degrees, blocks as u32);
        World { degrees, ranks, counters, placement, next_block: 0, blocks, family }
    }

    pub fn sequence(&mut self, prompt: &[u32]) -> Sequence {
        Sequence { prompt_len: prompt.len(), tokens: prompt.to_vec(), cached: 0, blocks: Vec::new() }
    }

    /// Computes the next `rows` uncached tokens of each sequence in one step of data-parallel rank `group`, and returns
    /// the logits of every row.
    pub fn step(&mut self, group: usize, work: &mut [(&mut Sequence, usize)]) -> Stepped {
        let (mut tokens, mut spans, mut table) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, rows) in work.iter_mut() {
            let end = sequence.cached + *rows;
            while sequence.blocks.len() * BLOCK < end {
                assert!(self.next_block < self.blocks, "test ran out of KV blocks");
                // Scattered, so that nothing relies on blocks being neighbours.
                sequence.blocks.push((self.next_block * 7 + 3) % self.blocks);
                self.next_block += 1;
            }
            spans.push(SeqSpan {
                row: tokens.len() as u32,
                rows: *rows as u32,
                position: sequence.cached as u32,
                prompt_len: sequence.prompt_len as u32,
                first_block: table.len() as u32,
            });
            table.extend(&sequence.blocks);
            tokens.extend(&sequence.tokens[sequence.cached..end]);
            sequence.cached = end;
        }
        let wanted: Vec<u32> = (0..tokens.len() as u32).collect();
        let busy = Batch {
            tokens: &tokens,
            attention: AttentionBatch { spans: &spans, block_table: &table },
            logit_rows: &wanted,
            want_routing: true,
        };
        let idle = Batch {
            tokens: &[],
            attention: AttentionBatch { spans: &[], block_table: &[] },
            logit_rows: &[],
            want_routing: true,
        };
        on_threads(&mut self.ranks, |rank| {
            let batch = if rank.dp_rank == group { busy } else { idle };
            rank.model.forward(&batch, &mut rank.output).unwrap();
        });
        self.collect(group, tokens.len())
    }

    fn collect(&self, group: usize, rows: usize) -> Stepped {
        let vocab = self.family.spec.vocab_size;
        let layers = self.family.spec.moe_layers().len();
        let top_k = self.family.spec.moe.top_k;
        let mut logits = vec![Vec::new(); rows];
        let mut routing = Routing {
            first_row: 0,
            rows,
            top_k,
            ids: vec![u32::MAX; layers * rows * top_k],
            weights: vec![f32::NAN; layers * rows * top_k],
        };
        for rank in self.ranks.iter().filter(|r| r.dp_rank == group) {
            for (i, &row) in rank.output.logit_rows.iter().enumerate() {
                let mut host = vec![0f32; vocab];
                let view = rank.output.logits.view().rows_range(i..i + 1);
                rank.backend.download(view, bytemuck::cast_slice_mut(&mut host)).unwrap();
                logits[row as usize] = host;
            }
            let part = &rank.output.routing;
            for layer in 0..layers {
                let n = part.rows * top_k;
                let (from, to) = (layer * n, (layer * rows + part.first_row) * top_k);
                routing.ids[to..to + n].copy_from_slice(&part.ids[from..from + n]);
                routing.weights[to..to + n].copy_from_slice(&part.weights[from..from + n]);
            }
        }
        assert!(logits.iter().all(|l| l.len() == vocab), "every row has exactly one owner");
        Stepped { logits, routing }
    }

    /// Runs a prompt in one step and then `steps` greedy tokens; returns the logits of every position computed.
    pub fn generate(&mut self, prompt: &[u32], steps: usize) -> (Vec<Vec<f32>>, Vec<u32>) {
        let mut sequence = self.sequence(prompt);
        let mut logits = self.step(0, &mut [(&mut sequence, prompt.len())]).logits;
        let mut generated = Vec::new();
        for _ in 0..steps {
            let token = argmax(logits.last().unwrap());
            generated.push(token);
            sequence.tokens.push(token);
            logits.extend(self.step(0, &mut [(&mut sequence, 1)]).logits);
        }
        (logits, generated)
    }

    /// What all ranks counted.
    pub fn load_snapshot(&self) -> LoadSnapshot {
        WorldLoad { in_force: self.in_force(), counters: self.counters.clone() }.snapshot()
    }

    pub fn in_force(&self) -> Arc<InForce> {
        Arc::new(InForce::new(Arc::clone(&self.placement)))
    }

    pub fn placement(&self) -> Arc<Placement> {
        Arc::clone(&self.placement)
    }

    pub fn degrees(&self) -> Degrees {
        self.degrees
    }

    /// The ranks as an engine takes them over, with something around their models.
    pub fn into_setups(self, around: impl Fn(Transformer) -> Box<dyn Model>) -> Vec<RankSetup> {
        let setup = |LoadedRank { model, output, backend, dp_rank, meter }| RankSetup {
            model: around(model),
            backend,
            output,
            dp_rank,
            meter,
        };
        self.ranks.into_iter().map(setup).collect()
    }

    /// Runs `body` on every rank, each on a thread of its own that stays for all of it.
    pub fn on_ranks<T: Send>(&mut self, body: impl Fn(usize, &mut LoadedRank) -> T + Sync) -> Vec<T> {
        on_threads(self.ranks.iter_mut().enumerate(), |(i, rank)| body(i, rank))
    }
}

/// The most probable token; ties go to the lowest id.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &x) in logits.iter().enumerate() {
        if x > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// A golden.json with its tensors.
pub struct Golden {
    pub json: serde_json::Value,
    tensors: Vec<u8>,
}

impl Golden {
    pub fn open(dir: &Path) -> Golden {
        Golden::read(&dir.join("golden.json"))
    }

    /// Any file of the same schema, such as an engine's dump.
    pub fn read(path: &Path) -> Golden {
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let tensors =
            json["tensors_file"].as_str().map(|name| std::fs::read(path.with_file_name(name)).unwrap());
        Golden { json, tensors: tensors.unwrap_or_default() }
    }

    /// The bytes of the tensors' file.
    pub fn tensor_bytes(&self) -> &[u8] {
        &self.tensors
    }

    /// A tensor referred to as `{"tensor": name}`, as f64 (exact for F32 and I32), row-major.
    pub fn tensor(&self, reference: &serde_json::Value) -> Vec<f64> {
        let name = reference["tensor"].as_str().unwrap_or_else(|| panic!("not a tensor: {reference}"));
        let file = safetensors::SafeTensors::deserialize(&self.tensors).unwrap();
        let tensor = file.tensor(name).unwrap();
        let words = tensor.data().chunks_exact(4).map(|b| <[u8; 4]>::try_from(b).unwrap());
        match tensor.dtype() {
            safetensors::Dtype::F32 => words.map(|b| f64::from(f32::from_le_bytes(b))).collect(),
            safetensors::Dtype::I32 => words.map(|b| f64::from(i32::from_le_bytes(b))).collect(),
            other => panic!("{name} is {other:?}"),
        }
    }
}

/// Token ids out of JSON.
pub fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}
