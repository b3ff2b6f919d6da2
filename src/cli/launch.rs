//! From an opened checkpoint and options to a running engine: what `serve`, `generate` and `verify` have in common.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Expected, Linear, Placement, PlacementPolicy};

use super::devices::{self, Devices};
use super::model::OpenModel;
use super::serve::dtype_name;
use super::{log, progress};
use crate::backend::{Backend, Precision};
use crate::comm::Transport;
use crate::config::memory::{self, Demand, MemoryPlan};
use crate::config::{Options, RawOptions};
use crate::engine::rebalance::Mode;
use crate::engine::recorder::{Recorder, ServingSettings};
use crate::engine::{
    Engine, EngineHandle, EngineOptions, Experts, Hooks, RankSetup, RebalanceOptions, RebalanceSources,
    TimingObserver,
};
use crate::error::Result;
use crate::model::FormRules;
use crate::model::footprint::{Footprint, Share};
use crate::model::load::Sizes;
use crate::model::world::{Degrees, LoadedRank, WorldOptions, load_world};
use crate::moe::in_force::InForce;
use crate::moe::load::{LoadCounters, WorldLoad};
use crate::server::Sources;
use crate::spec::ModelSpec;
use crate::weights::{WeightReader, check_finite, check_manifest, stored_bytes};

/// How long a trace may take to be written out after the engine has stopped.
const TRACE_PATIENCE: Duration = Duration::from_secs(5);

/// Everything that is known before a weight is read.
pub struct Prepared {
    /// The checkpoint.
    pub model: OpenModel,
    /// What the user's options came to.
    pub options: Options,
    /// Where experts live at the start.
    pub placement: Arc<Placement>,
    /// Where they live now.
    pub in_force: Arc<InForce>,
    /// One per rank.
    pub backends: Vec<Arc<dyn Backend>>,
    /// How they exchange rows.
    pub transport: Transport,
    /// What each rank will hold.
    pub footprint: Footprint,
    /// Context length and KV blocks that fit.
    pub memory: MemoryPlan,
    /// One counter set per rank: metrics are described before the model is loaded.
    pub counters: Vec<Arc<LoadCounters>>,
    /// The routing trace, when one was asked for.
    pub recorder: Option<Arc<Recorder>>,
}

/// A running engine and what to finish after it.
pub struct Launched {
    /// Takes requests.
    pub engine: EngineHandle,
    recorder: Option<Arc<Recorder>>,
    save_placement: Option<PathBuf>,
}

/// What a command needs beyond the defaults.
#[derive(Debug, Clone, Copy, Default)]
pub struct Needs {
    /// Logits of whole prompts: room for a chunk's logit rows, not only for one per sequence.
    pub prompt_logits: bool,
    /// Requests that may wait, when more than usual.
    pub queue: Option<usize>,
}

impl Prepared {
    /// Resolves options, checks that everything fits, and makes the ranks' devices.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for options that do not fit the model, [`crate::Error::Memory`] when weights, KV cache and working space
    /// exceed the device: no weight has been read then. [`crate::Error::Routing`] for a placement file that does not fit or a
    /// trace that cannot be created.
    pub fn new(model: OpenModel, raw: RawOptions, needs: Needs) -> Result<Prepared> {
        let spec = &model.family.spec;
        let cores = available_parallelism().map_or(1, usize::from);
        let options = Options::resolve(raw, spec, cores)?;
        if options.model.check_weights {
            check_manifest(&model.checkpoint)?;
            check_finite(&model.checkpoint, spec, &model.family.names, None)?;
        }
        let placement = Arc::new(placement(spec, &options)?);
        let model_options = options.model;
        let Devices { backends, memory: available, transport } =
            devices::open(&model_options, options.parallel.world)?;
        let sizes = sizes(spec, &options, needs, None);
        let share = Share {
            backend: backends[0].as_ref(),
            degrees: degrees(&options),
            slots: placement.slots_per_rank(),
            precision: precision(spec, &options),
            sizes,
        };
        let footprint = Footprint::of(spec, share);
        let memory = memory::plan(available, &demand(spec, &options, footprint, backends[0].describe()))?;
        let counters = (0..options.parallel.world).map(|_| Arc::new(LoadCounters::new(&placement))).collect();
        // A path that cannot be written is told before minutes go into loading.
        let recorder = match &options.experts.record_routing {
            Some(path) => Some(Arc::new(Recorder::create(
                path,
                spec,
                degrees(&options),
                &placement,
                ServingSettings {
                    split: options.experts.split,
                    rebalance: rebalance(&options, &placement),
                    staging_slots: options.experts.staging_slots,
                    expert_bytes: footprint.expert * options.parallel.expert_tp as u64,
                },
            )?)),
            None => None,
        };
        let in_force = Arc::new(InForce::new(Arc::clone(&placement)));
        Ok(Prepared {
            model,
            options,
            placement,
            in_force,
            backends,
            transport,
            footprint,
            memory,
            counters,
            recorder,
        })
    }

    /// The types that the ranks compute in.
    pub fn precision(&self) -> Precision {
        precision(&self.model.family.spec, &self.options)
    }

    /// The same for people to read: `bf16`, or `bf16 with int8 experts`.
    pub fn types(&self) -> String {
        let dtype = dtype_name(self.options.model.dtype);
        match self.options.model.quantize {
            Some(quantize) => format!("{dtype} with {} experts", quantize.name()),
            None => dtype.to_owned(),
        }
    }

    /// The load counters as one source.
    pub fn load(&self) -> WorldLoad {
        WorldLoad { in_force: Arc::clone(&self.in_force), counters: self.counters.clone() }
    }

    /// What the metrics page is filled from.
    pub fn metric_sources(&self) -> Sources {
        let spec = &self.model.family.spec;
        Sources {
            load: Some(Arc::new(self.load())),
            row_bytes: spec.hidden_size * precision(spec, &self.options).activations.bytes(),
            trace: self.recorder.as_ref().map(|recorder| recorder.counters()),
            ranks: self.counters.iter().map(|counters| Arc::clone(&counters.meter)).collect(),
            dropped_log_lines: log::dropped_lines(),
        }
    }

    /// Reads the weights and starts the engine.
    ///
    /// # Errors
    /// As [`load_world`] and [`Engine::start`].
    pub fn launch(&self, needs: Needs, timing: Option<Arc<dyn TimingObserver>>) -> Result<Launched> {
        let spec = &self.model.family.spec;
        let sizes = sizes(spec, &self.options, needs, Some(self.memory));
        let setups = self
            .load_ranks(sizes)?
            .into_iter()
            .map(|rank| RankSetup {
                model: Box::new(rank.model),
                backend: rank.backend,
                output: rank.output,
                dp_rank: rank.dp_rank,
                meter: rank.meter,
            })
            .collect();
        let recorder = self.recorder.clone();
        let hooks = Hooks {
            steps: recorder.clone().map(|r| r as _),
            timing,
            experts: Some(self.experts()),
            rebalancing: self.rebalancing(),
        };
        let engine = Engine::start(setups, self.engine_options(sizes, needs), hooks)?;
        let save_placement = self.options.experts.save_placement.clone();
        Ok(Launched { engine, recorder, save_placement })
    }

    fn experts(&self) -> Experts {
        let Options { experts, parallel, .. } = &self.options;
        Experts {
            in_force: Arc::clone(&self.in_force),
            staging_slots: experts.staging_slots,
            expert_tp: parallel.expert_tp,
            // All ranks live in this process.
            ranks_per_node: parallel.ep,
            expert_bytes: self.footprint.expert,
            bandwidth: experts.move_bandwidth.map(|size| size.0),
        }
    }

    /// What decides where experts move, where they can.
    fn rebalancing(&self) -> Option<RebalanceSources> {
        (self.options.experts.staging_slots > 0).then(|| RebalanceSources {
            options: rebalance(&self.options, &self.placement),
            split: self.options.experts.split,
            top_k: self.model.family.spec.moe.top_k,
            load: Arc::new(self.load()),
            meters: self.counters.iter().map(|counters| Arc::clone(&counters.meter)).collect(),
            recorder: self.recorder.clone(),
        })
    }

    fn load_ranks(&self, sizes: Sizes) -> Result<Vec<LoadedRank>> {
        let OpenModel { checkpoint, family, .. } = &self.model;
        let world = WorldOptions {
            degrees: degrees(&self.options),
            transport: self.transport.clone(),
            precision: precision(&family.spec, &self.options),
            placement: Arc::clone(&self.placement),
            split: self.options.experts.split,
            sizes,
            counters: self.counters.clone(),
        };
        let bytes = stored_bytes(checkpoint, &family.spec, &family.names).iter().map(|(_, n)| n).sum();
        let bar = progress::bytes("loading weights", bytes);
        let tell = |read| bar.inc(read);
        let reader = WeightReader::new(checkpoint, &family.spec, &family.names, world.precision.weights);
        let ranks = load_world(reader.with_progress(&tell), &family.spec, self.backends.clone(), &world);
        bar.finish_and_clear();
        checkpoint.forget();
        ranks
    }

    fn engine_options(&self, sizes: Sizes, needs: Needs) -> EngineOptions {
        let spec = &self.model.family.spec;
        let scheduler = &self.options.scheduler;
        EngineOptions {
            vocab_size: spec.vocab_size,
            experts: spec.moe.experts,
            max_model_len: sizes.max_model_len,
            block_size: sizes.block_size,
            kv_blocks: sizes.kv_blocks,
            max_num_seqs: scheduler.max_num_seqs,
            max_num_batched_tokens: scheduler.max_num_batched_tokens,
            prefill_chunk_size: scheduler.prefill_chunk_size,
            max_logit_rows: sizes.max_logit_rows,
            prefix_caching: self.options.cache.prefix_caching,
            form_rules: FormRules::of_spec(spec),
            max_waiting: needs.queue.unwrap_or(scheduler.max_queued_requests),
            max_waiting_tokens: scheduler.max_queued_tokens,
            scheduling_policy: scheduler.policy,
            step_timeout: scheduler.step_timeout,
        }
    }
}

impl Launched {
    /// Stops the engine, giving running requests `drain` to finish and a step under way `patience` beyond that, and
    /// completes the trace. A trace that failed is told, and is no failure of serving.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when a device ended the engine.
    pub fn finish(self, drain: Duration, patience: Duration) -> Result<()> {
        if !self.engine.shutdown_within(drain, patience) {
            tracing::warn!("a step was still under way at the end of the shutdown");
        }
        if let Some(recorder) = self.recorder
            && let Err(error) = recorder.finish(TRACE_PATIENCE)
        {
            tracing::warn!("the routing trace is incomplete: {error}");
        }
        if let (Some(path), Some(placement)) = (self.save_placement, self.engine.placement())
            && let Err(error) = placement.write(&path)
        {
            tracing::warn!("the placement is not saved: {error}");
        }
        self.engine.lost_device().map_or(Ok(()), Err)
    }
}

/// Experts move by themselves where the user has paid for spare slots, unless told otherwise: without any, balance can
/// only be bought by swaps, and few of them pay.
fn rebalance(options: &Options, placement: &Placement) -> RebalanceOptions {
    let experts = &options.experts;
    let spare = placement.slots() > placement.experts();
    RebalanceOptions {
        mode: experts.rebalance.unwrap_or(if spare { Mode::Auto } else { Mode::Off }),
        policy: experts.rebalance_policy,
        window_steps: experts.rebalance_window,
    }
}

fn degrees(options: &Options) -> Degrees {
    let parallel = options.parallel;
    Degrees { tensor_parallel: parallel.tp, data_parallel: parallel.dp, expert_tp: parallel.expert_tp }
}

fn precision(spec: &ModelSpec, options: &Options) -> Precision {
    options.model.precision(&spec.moe.router)
}

/// `memory` is `None` while it is still being planned.
fn sizes(spec: &ModelSpec, options: &Options, needs: Needs, memory: Option<MemoryPlan>) -> Sizes {
    let scheduler = &options.scheduler;
    let longest = scheduler.max_model_len.unwrap_or(spec.max_position_embeddings);
    Sizes {
        max_model_len: memory.map_or(longest, |plan| plan.max_model_len),
        block_size: options.cache.block_size,
        kv_blocks: memory.map_or(0, |plan| plan.kv_blocks),
        max_rows: scheduler.max_num_batched_tokens,
        max_logit_rows: match needs.prompt_logits {
            true => scheduler.max_num_seqs + scheduler.prefill_chunk_size,
            false => scheduler.max_num_seqs,
        },
        staging_slots: options.experts.staging_slots,
    }
}

fn demand(spec: &ModelSpec, options: &Options, footprint: Footprint, device: String) -> Demand {
    let ranks = options.parallel.world;
    Demand {
        device,
        weights: footprint.weights.saturating_mul(ranks as u64),
        working: footprint.working.saturating_mul(ranks as u64),
        ranks,
        kv_block: footprint.kv_block,
        block_size: options.cache.block_size,
        kv_memory: options.cache.memory,
        max_model_len: options.scheduler.max_model_len,
        model_positions: spec.max_position_embeddings,
        max_num_seqs: options.scheduler.max_num_seqs,
    }
}

fn placement(spec: &ModelSpec, options: &Options) -> Result<Placement> {
    let layer_ids = spec.moe_layers();
    let ranks = options.parallel.ep;
    match &options.experts.placement {
        Some(path) => {
            let expected = Expected { ranks: Some(ranks), experts: spec.moe.experts, layer_ids: &layer_ids };
            Ok(Placement::read(path, &expected)?)
        }
        None => {
            let slots = options.experts.slots_per_rank * ranks;
            let shape = ClusterShape { ranks, redundant: slots.saturating_sub(spec.moe.experts) };
            Ok(Linear.place(&LoadWindow::new(&layer_ids, spec.moe.experts), &shape)?)
        }
    }
}
