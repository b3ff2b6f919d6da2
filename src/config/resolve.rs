//! From [`RawOptions`] and a model to the values the program runs on, each default filled in once, each limit checked.

use std::path::PathBuf;
use std::time::Duration;

use router_sim::placement::PolicyName;
use router_sim::rebalance::Mode;
use router_sim::split::Split;

use super::flags::{
    CommChoice, DeviceChoice, DtypeChoice, ExpertDetailChoice, PolicyChoice, QuantizeChoice, RawMetrics,
    RawOptions, RebalancePolicyChoice, SplitChoice,
};
use super::parallel::Parallel;
use super::secret::Secret;
use super::size::ByteSize;
use crate::backend::{DType, Precision, int8};
use crate::engine::SchedulingPolicy;
use crate::error::{Error, Result};
use crate::metrics::ExpertDetail;
use crate::server::SeriesOptions;
use crate::spec::{ModelSpec, Router};

/// Everything the program runs on but what depends on free memory: see [`super::memory`] for that.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// The HTTP endpoint.
    pub server: ServerOptions,
    /// The weights.
    pub model: ModelOptions,
    /// The ranks.
    pub parallel: Parallel,
    /// The batches.
    pub scheduler: SchedulerOptions,
    /// The KV cache.
    pub cache: CacheOptions,
    /// The experts.
    pub experts: ExpertOptions,
}

/// What the HTTP endpoint is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerOptions {
    /// Name or address to listen on.
    pub host: String,
    /// Port; 0 is any free one.
    pub port: u16,
    /// Keys that requests must show one of; none asks for none.
    pub api_keys: Vec<Secret>,
    /// Render chat templates that requests bring.
    pub trust_chat_template: bool,
    /// Name of the model; `None` is the folder's.
    pub served_model_name: Option<String>,
    /// Where sampling defaults come from.
    pub generation_config: GenerationConfig,
    /// How long running requests may take to finish after a stop signal.
    pub drain_timeout: Duration,
    /// What the metrics page shows.
    pub metrics: SeriesOptions,
}

/// Where sampling defaults come from, before OpenAI's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GenerationConfig {
    /// generation_config.json of the checkpoint, where it has one.
    Checkpoint,
    /// Nowhere.
    None,
    /// This file.
    File(PathBuf),
}

/// How the model is loaded and computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelOptions {
    /// `--device`; what it comes to is for who opens the devices to see.
    pub device: DeviceChoice,
    /// `--dtype`; what it means for a model is [`crate::backend::Precision::of`]'s to say.
    pub dtype: DType,
    /// `--quantize`.
    pub quantize: Option<QuantizeChoice>,
    /// Compute threads of each rank.
    pub threads: usize,
    /// `--comm`; what it comes to is for who opens the devices to see.
    pub comm: CommChoice,
    /// How long an exchange between GPUs may take.
    pub comm_timeout: Duration,
    /// Look for NaN and infinity while loading.
    pub check_weights: bool,
}

impl ModelOptions {
    /// The types that a model with this router computes in.
    pub fn precision(&self, router: &Router) -> Precision {
        let precision = Precision::of(self.dtype, router);
        match self.quantize {
            Some(quantize) => precision.with_experts(quantize.dtype()),
            None => precision,
        }
    }
}

/// Limits of a step, per DP rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerOptions {
    /// Longest sequence the user wants to serve; `None` leaves it to model and memory.
    pub max_model_len: Option<usize>,
    /// Sequences in one step.
    pub max_num_seqs: usize,
    /// Rows in one step; at least `max_num_seqs`.
    pub max_num_batched_tokens: usize,
    /// Prompt rows of one sequence in one step; at most `max_num_batched_tokens`.
    pub prefill_chunk_size: usize,
    /// Who goes first.
    pub policy: SchedulingPolicy,
    /// Requests that may wait.
    pub max_queued_requests: usize,
    /// Their prompt tokens.
    pub max_queued_tokens: usize,
    /// After it, a silent rank is hung.
    pub step_timeout: Duration,
}

/// The paged KV cache of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOptions {
    /// Tokens per block.
    pub block_size: usize,
    /// Bytes per rank; `None` takes them from free memory.
    pub memory: Option<ByteSize>,
    /// Reuse the blocks of equal prefixes.
    pub prefix_caching: bool,
}

/// Where experts live, and what is recorded of their use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertOptions {
    /// Slots per rank and MoE layer; a placement file has its own number.
    pub slots_per_rank: usize,
    /// Among the replicas of an expert.
    pub split: Split,
    /// Experts on their way to a rank at once; 0 where they stay where they are.
    pub staging_slots: usize,
    /// Bytes per second that a rank may send of expert weights; `None` takes a share of the steps' time.
    pub move_bandwidth: Option<ByteSize>,
    /// When experts move by themselves; `None` leaves it to the placement.
    pub rebalance: Option<Mode>,
    /// Who plans where they move.
    pub rebalance_policy: PolicyName,
    /// Steps of load that are planned on.
    pub rebalance_window: u64,
    /// Where to keep the placement at the end.
    pub save_placement: Option<PathBuf>,
    /// Placement file to start with.
    pub placement: Option<PathBuf>,
    /// Routing trace to write.
    pub record_routing: Option<PathBuf>,
}

const MAX_THREADS: usize = 1024;
const MAX_SEQS: usize = 1 << 12;
const MAX_BATCHED_TOKENS: usize = 1 << 20;
const MAX_BLOCK_SIZE: usize = 1024;
/// Each waiting request costs some kilobytes besides its prompt.
const MAX_QUEUED_REQUESTS: usize = 1 << 20;
const MAX_QUEUED_TOKENS: usize = 1 << 30;
const MAX_STAGING_SLOTS: usize = 64;
const MAX_WINDOW_STEPS: u64 = 1 << 20;
/// Slower than this, a placement is out of date before it is in force.
const MIN_MOVE_BANDWIDTH: u64 = 1 << 20;
/// An exchange between GPUs takes milliseconds; connecting many of them takes seconds.
const COMM_SECONDS: u64 = 60;
const MAX_STEP_SECONDS: u64 = 24 * 60 * 60;
const MAX_DRAIN_SECONDS: u64 = 24 * 60 * 60;
/// [`crate::backend::KvCache`] is laid out in groups of this many tokens.
const BLOCK_STEP: usize = 16;

impl Options {
    /// Fills in every default for a model on a machine with `cores` cores.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option, the limit and the value.
    pub fn resolve(raw: RawOptions, spec: &ModelSpec, cores: usize) -> Result<Options> {
        let parallel = Parallel::resolve(&raw, spec)?;
        Ok(Options {
            model: model(&raw, spec, &parallel, cores)?,
            scheduler: scheduler(&raw, spec)?,
            cache: cache(&raw)?,
            experts: experts(&raw, &parallel, spec)?,
            server: server(raw)?,
            parallel,
        })
    }
}

fn server(raw: RawOptions) -> Result<ServerOptions> {
    let drain = within("drain-timeout", raw.drain_timeout, 30, 0, MAX_DRAIN_SECONDS)?;
    Ok(ServerOptions {
        host: raw.host.unwrap_or_else(|| "127.0.0.1".to_owned()),
        port: raw.port.unwrap_or(8000),
        api_keys: api_keys(raw.api_key.unwrap_or_default())?,
        trust_chat_template: raw.trust_request_chat_template.unwrap_or(false),
        served_model_name: raw.served_model_name,
        generation_config: match raw.generation_config.as_deref() {
            None | Some("auto") => GenerationConfig::Checkpoint,
            Some("none") => GenerationConfig::None,
            Some(path) => GenerationConfig::File(PathBuf::from(path)),
        },
        drain_timeout: Duration::from_secs(drain),
        metrics: metrics(&raw.metrics),
    })
}

/// Keys must be able to stand in a header. The message does not repeat them.
fn api_keys(keys: Vec<Secret>) -> Result<Vec<Secret>> {
    let sendable =
        |key: &Secret| !key.reveal().is_empty() && key.reveal().bytes().all(|byte| byte.is_ascii_graphic());
    match keys.iter().position(|key| !sendable(key)) {
        Some(at) => {
            let why = format!("key {} must be printable ASCII without spaces, and not empty", at + 1);
            Err(Error::config("api-key", why))
        }
        None => Ok(keys),
    }
}

/// Rows of activations that GPUs multiply with quantised experts come in steps of 16 bytes.
const HIDDEN_STEP: usize = 8;

fn metrics(raw: &RawMetrics) -> SeriesOptions {
    let detail = raw.expert_detail.map(|choice| match choice {
        ExpertDetailChoice::Off => ExpertDetail::Off,
        ExpertDetailChoice::Rank => ExpertDetail::Rank,
        ExpertDetailChoice::Layer => ExpertDetail::Layer,
        ExpertDetailChoice::LayerRank => ExpertDetail::LayerRank,
        ExpertDetailChoice::Expert => ExpertDetail::Expert,
    });
    let max_series = raw.max_series.unwrap_or(SeriesOptions::default().max_series);
    SeriesOptions { expert_detail: detail, max_series }
}

fn model(raw: &RawOptions, spec: &ModelSpec, parallel: &Parallel, cores: usize) -> Result<ModelOptions> {
    check_quantize(raw, spec)?;
    let share = (cores / parallel.world).clamp(1, MAX_THREADS);
    Ok(ModelOptions {
        device: raw.device.unwrap_or(DeviceChoice::Auto),
        // Auto is bf16 for every checkpoint, F32 ones too: on a CPU the bytes of the weights are the time of a step,
        // and who wants f32 says so.
        dtype: match raw.dtype.unwrap_or(DtypeChoice::Auto) {
            DtypeChoice::F32 => DType::F32,
            DtypeChoice::Auto | DtypeChoice::Bf16 => DType::Bf16,
        },
        quantize: raw.quantize,
        threads: within("threads", raw.threads, share, 1, MAX_THREADS)?,
        comm: raw.comm.unwrap_or(CommChoice::Auto),
        comm_timeout: Duration::from_secs(within(
            "comm-timeout",
            raw.comm_timeout,
            COMM_SECONDS,
            1,
            MAX_STEP_SECONDS,
        )?),
        check_weights: raw.check_weights.unwrap_or(false),
    })
}

/// What the experts of `--quantize` ask of device, types and model.
fn check_quantize(raw: &RawOptions, spec: &ModelSpec) -> Result<()> {
    let Some(quantize) = raw.quantize else { return Ok(()) };
    let refused = |why: String| Err(Error::config("quantize", why));
    if let Some(given @ (DeviceChoice::Cpu | DeviceChoice::Cuda)) = raw.device
        && given != quantize.device()
    {
        let found = if given == DeviceChoice::Cpu { "cpu" } else { "cuda" };
        return refused(format!("{}, found device {found}", quantize.where_computed()));
    }
    match quantize {
        QuantizeChoice::Int8 => {
            // Sums of products in 8 bits must not overflow.
            let shared = spec.moe.shared.map_or(0, |shared| shared.intermediate);
            let widest = spec.hidden_size.max(spec.moe.intermediate).max(shared);
            if widest > int8::MAX_INPUTS {
                let most = int8::MAX_INPUTS;
                return refused(format!(
                    "int8 adds up {most} products at most, and an expert of this model is {widest} wide"
                ));
            }
        }
        QuantizeChoice::Fp8 | QuantizeChoice::Int4 => {
            let name = quantize.name();
            if raw.dtype == Some(DtypeChoice::F32) {
                return refused(format!("{name} experts are multiplied in bf16, found dtype f32"));
            }
            if Precision::of(DType::Bf16, &spec.moe.router).activations != DType::Bf16 {
                return refused(format!(
                    "{name} experts are multiplied in bf16, and this model's router needs activations in f32"
                ));
            }
            if !spec.hidden_size.is_multiple_of(HIDDEN_STEP) {
                let hidden = spec.hidden_size;
                return refused(format!(
                    "{name} experts need a hidden size that is a multiple of {HIDDEN_STEP}, found {hidden}"
                ));
            }
        }
    }
    Ok(())
}

fn scheduler(raw: &RawOptions, spec: &ModelSpec) -> Result<SchedulerOptions> {
    let positions = spec.max_position_embeddings;
    let max_model_len =
        raw.max_model_len.map(|n| within("max-model-len", Some(n), n, 1, positions)).transpose()?;
    let seqs = within("max-num-seqs", raw.max_num_seqs, 64, 1, MAX_SEQS)?;
    // A decode row of every running sequence must fit into one step.
    let (key, given) = ("max-num-batched-tokens", raw.max_num_batched_tokens);
    let batched = within(key, given, 2048.max(seqs), seqs, MAX_BATCHED_TOKENS)?;
    let chunk = within("prefill-chunk-size", raw.prefill_chunk_size, 512.min(batched), 1, batched)?;
    let step = within("step-timeout", raw.step_timeout, 10, 1, MAX_STEP_SECONDS)?;
    Ok(SchedulerOptions {
        max_model_len,
        max_num_seqs: seqs,
        max_num_batched_tokens: batched,
        prefill_chunk_size: chunk,
        policy: match raw.scheduling_policy.unwrap_or(PolicyChoice::Arrival) {
            PolicyChoice::Arrival => SchedulingPolicy::Arrival,
            PolicyChoice::Priority => SchedulingPolicy::Priority,
        },
        max_queued_requests: within(
            "max-queued-requests",
            raw.max_queued_requests,
            1024,
            1,
            MAX_QUEUED_REQUESTS,
        )?,
        max_queued_tokens: within("max-queued-tokens", raw.max_queued_tokens, 1 << 20, 1, MAX_QUEUED_TOKENS)?,
        step_timeout: Duration::from_secs(step),
    })
}

fn cache(raw: &RawOptions) -> Result<CacheOptions> {
    let block_size = within("block-size", raw.block_size, 32, BLOCK_STEP, MAX_BLOCK_SIZE)?;
    if !block_size.is_multiple_of(BLOCK_STEP) {
        let why = format!("expected a multiple of {BLOCK_STEP}, found {block_size}");
        return Err(Error::config("block-size", why));
    }
    let prefix_caching = !raw.no_prefix_caching.unwrap_or(false);
    Ok(CacheOptions { block_size, memory: raw.kv_cache_memory, prefix_caching })
}

fn experts(raw: &RawOptions, parallel: &Parallel, spec: &ModelSpec) -> Result<ExpertOptions> {
    let experts = spec.moe.experts;
    if raw.placement.is_some() && raw.redundant_experts.is_some() {
        let why = "a placement file has its own number of slots: give one of the two";
        return Err(Error::config("placement with redundant-experts", why));
    }
    // Beyond one more copy of every expert on every rank, slots hold nothing that helps.
    let redundant = within("redundant-experts", raw.redundant_experts, 0, 0, experts * parallel.ep)?;
    let staging_slots = match (parallel.ep, raw.staging_slots) {
        (1, None) => 0,
        (1, Some(given)) if given > 0 => {
            let why = format!("a single expert-parallel rank has nowhere to move experts to, found {given}");
            return Err(Error::config("staging-slots", why));
        }
        (_, given) => within("staging-slots", given, 1, 0, MAX_STAGING_SLOTS)?,
    };
    if let Some(ByteSize(bytes)) = raw.rebalance_bandwidth {
        let given = staging_slots > 0 && bytes >= MIN_MOVE_BANDWIDTH;
        if !given {
            let least = ByteSize(MIN_MOVE_BANDWIDTH);
            let why = match staging_slots {
                0 => "no expert moves: there is no staging place (staging-slots)".to_owned(),
                _ => format!("expected at least {least} per second, found {}", ByteSize(bytes)),
            };
            return Err(Error::config("rebalance-bandwidth", why));
        }
    }
    Ok(ExpertOptions {
        slots_per_rank: parallel.slots_per_rank(experts, redundant),
        split: match raw.split.unwrap_or(SplitChoice::Exact) {
            SplitChoice::Exact => Split::Exact,
            SplitChoice::Even => Split::Even,
            SplitChoice::Waterfill => Split::WaterFill,
            // The ranks of one process share a node.
            SplitChoice::Nearest => Split::Nearest { ranks_per_node: parallel.ep },
            SplitChoice::Activated => Split::ACTIVATED,
        },
        staging_slots,
        move_bandwidth: raw.rebalance_bandwidth,
        rebalance: rebalance(raw, parallel.ep, staging_slots)?,
        rebalance_policy: match raw.rebalance_policy.unwrap_or(RebalancePolicyChoice::Moeyard) {
            RebalancePolicyChoice::Moeyard => PolicyName::BEST,
            RebalancePolicyChoice::Eplb => PolicyName::Eplb,
        },
        rebalance_window: within("rebalance-window", raw.rebalance_window, 256, 1, MAX_WINDOW_STEPS)?,
        save_placement: raw.save_placement.clone(),
        placement: raw.placement.clone(),
        record_routing: raw.record_routing.clone(),
    })
}

/// When experts move by themselves, where they can move.
fn rebalance(raw: &RawOptions, ranks: usize, staging_slots: usize) -> Result<Option<Mode>> {
    let asked = [
        ("rebalance", raw.rebalance.is_some_and(|mode| mode != Mode::Off)),
        ("rebalance-policy", raw.rebalance_policy.is_some()),
        ("rebalance-window", raw.rebalance_window.is_some()),
    ];
    let why = match (ranks, staging_slots) {
        (1, _) => "a single expert-parallel rank has nowhere to move experts to",
        (_, 0) => "no expert moves: there is no staging place (staging-slots)",
        _ => return Ok(raw.rebalance),
    };
    match asked.into_iter().find(|(_, asked)| *asked) {
        Some((key, _)) => Err(Error::config(key, why)),
        None => Ok(Some(Mode::Off)),
    }
}

/// The value given, or the default; refused outside `min..=max`.
fn within<T: PartialOrd + std::fmt::Display>(
    key: &str,
    given: Option<T>,
    default: T,
    min: T,
    max: T,
) -> Result<T> {
    let value = given.unwrap_or(default);
    if value >= min && value <= max {
        return Ok(value);
    }
    Err(Error::config(key, format!("expected {min} to {max}, found {value}")))
}

#[cfg(test)]
mod tests;
