//! Fills the families of [`crate::metrics`]. The recorder is the server's own, not the process's, so that several
//! servers can live in one process.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::StatusCode;
use metrics::{Counter, Histogram};

use router_sim::trace::TraceCounters;

use super::load_metrics::LoadMetrics;
use super::process;
use super::rank_metrics::RankMetrics;
use super::rebalance_metrics::RebalanceMetrics;
use super::registry::{Registry, count_series};
use crate::engine::stats::{RequestTiming, StepTiming};
use crate::engine::{EngineStats, RebalanceStatus, TimingObserver};
use crate::error::{CONTEXT_PHRASE, Error, QueueLimit, Result};
use crate::metrics::{self as family, ExpertDetail, LoadSource, RankMeter};

/// What the information families say; all of it is known at start.
#[derive(Debug, Clone, Default)]
pub struct Info {
    /// Device kind, "cpu".
    pub backend: String,
    /// Served model name.
    pub model: String,
    /// Computation type, "bf16".
    pub dtype: String,
    /// Type of the experts' weights: `int8`, `fp8`, `int4`, or that of the others.
    pub expert_dtype: String,
    /// Decoder layers.
    pub layers: usize,
    /// Experts per MoE layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Tensor-parallel degree.
    pub tp: usize,
    /// Data-parallel degree.
    pub dp: usize,
    /// Expert-parallel degree.
    pub ep: usize,
    /// Where the first placement came from, "linear" or "file".
    pub placement: String,
    /// Expert slots per MoE layer beyond one per expert.
    pub redundant_slots: usize,
    /// Memory of each rank.
    pub memory: Vec<RankMemory>,
}

/// See [`Info::memory`].
#[derive(Debug, Clone, Default)]
pub struct RankMemory {
    /// Bytes of weights.
    pub weights: u64,
    /// Bytes of KV cache.
    pub kv: u64,
    /// Bytes of activations and buffers.
    pub workspace: u64,
    /// Bytes of the weights that are in extra expert slots.
    pub redundant: u64,
}

/// Who is asked when a page is made.
#[derive(Default)]
pub struct Sources {
    /// Tells the expert load.
    pub load: Option<Arc<dyn LoadSource>>,
    /// Bytes of one token on its way to an expert, and as many on its way home; 0 where they are not known.
    pub row_bytes: usize,
    /// What becomes of the routing trace.
    pub trace: Option<Arc<TraceCounters>>,
    /// What each rank's time goes into, in rank order.
    pub ranks: Vec<Arc<RankMeter>>,
    /// Lines that the log had to drop.
    pub dropped_log_lines: Arc<AtomicU64>,
}

/// How much the page may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeriesOptions {
    /// How finely expert load is shown; `None` is [`ExpertDetail::of_model`].
    pub expert_detail: Option<ExpertDetail>,
    /// A setting that makes more series is refused.
    pub max_series: usize,
}

impl Default for SeriesOptions {
    fn default() -> Self {
        SeriesOptions { expert_detail: None, max_series: 20_000 }
    }
}

/// How a sequence ended, as `moeyard_requests_total` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A stop token or string.
    Stop,
    /// The length limit.
    Length,
    /// The client left.
    Abort,
    /// The engine failed or stopped.
    Error,
    /// Never started.
    Rejected,
}

impl Outcome {
    const ALL: [(Outcome, &'static str); 5] = [
        (Outcome::Stop, "stop"),
        (Outcome::Length, "length"),
        (Outcome::Abort, "abort"),
        (Outcome::Error, "error"),
        (Outcome::Rejected, "rejected"),
    ];

    /// The outcome behind a `finish_reason`.
    pub fn of(finish_reason: &str) -> Outcome {
        if finish_reason == "length" { Outcome::Length } else { Outcome::Stop }
    }
}

/// Routes and the status codes that exist from the start, so that the first of each is an increase and not a birth.
const EXPECTED_RESPONSES: &[(&str, &[u16])] = &[
    ("/v1/completions", &[200, 400, 404, 408, 413, 415, 429, 500, 503]),
    ("/v1/models", &[200]),
    ("/v1/models/{*id}", &[200, 404]),
    ("/tokenize", &[200, 400]),
    ("/detokenize", &[200, 400]),
    ("/health", &[200, 503]),
    ("/livez", &[200]),
    ("/readyz", &[200, 503]),
    ("/ping", &[200, 503]),
    ("/load", &[200]),
    ("/version", &[200]),
    ("/metrics", &[200]),
    ("/v1/experts", &[200, 304, 400]),
    ("/v1/experts/balance", &[200, 304]),
    ("/v1/experts/placement", &[200, 202, 304, 400, 409]),
    ("/v1/experts/rebalance", &[200, 202, 304, 400, 409]),
    ("/experts", &[200, 304, 401]),
    ("other", &[404]),
];

/// What runs sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Endpoint {
    const ALL: [(Endpoint, &'static str); 2] =
        [(Endpoint::Completions, "completions"), (Endpoint::Chat, "chat_completions")];
}

/// A server's metrics. The engine reports durations to it as its [`TimingObserver`].
pub struct Metrics {
    registry: Registry,
    /// `[endpoint][outcome]`
    sequences: [[Counter; Outcome::ALL.len()]; Endpoint::ALL.len()],
    rejected_queue_full: Counter,
    rejected_tokens: Counter,
    rejected_draining: Counter,
    rejected_too_long: Counter,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    request_duration: Histogram,
    request_queue: Histogram,
    request_prefill: Histogram,
    request_decode: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    /// Duration and rows of steps that were prefill, decode, mixed.
    steps: [(Histogram, Histogram); 3],
    step_imbalance: Histogram,
    ranks: RankMetrics,
    rebalancing: RebalanceMetrics,
    /// A std lock: taken once per page and per window, never across an await.
    load: Option<Mutex<LoadMetrics>>,
    sources: Sources,
}

impl Metrics {
    /// Metrics of a server with this model. All series but those of rare HTTP answers exist from now on, at 0.
    ///
    /// # Errors
    /// [`Error::Config`] when the page would have more than [`SeriesOptions::max_series`] series.
    pub fn new(info: &Info, sources: Sources, options: SeriesOptions) -> Result<Self> {
        let registry = Registry::new()?;
        registry.describe(info);
        let requests = |(_, endpoint): (Endpoint, &str)| {
            Outcome::ALL.map(|(_, name)| registry.counter(&family::REQUESTS_TOTAL, &[endpoint, name]))
        };
        let rejections = |reason| registry.counter(&family::ADMISSION_REJECTIONS_TOTAL, &[reason]);
        let step = |phase| {
            let duration = registry.histogram(&family::STEP_DURATION_SECONDS, &[phase]);
            (duration, registry.histogram(&family::STEP_TOKENS_PER_STEP, &[phase]))
        };
        for (route, codes) in EXPECTED_RESPONSES {
            for code in *codes {
                registry.counter(&family::HTTP_RESPONSES_TOTAL, &[route, &code.to_string()]).absolute(0);
            }
        }
        let load = sources.load.as_ref().map(|source| source.snapshot());
        let detail = load.as_ref().map_or(ExpertDetail::Off, |load| {
            let default = ExpertDetail::of_model(load.layer_ids.len(), load.experts);
            options.expert_detail.unwrap_or(default)
        });
        let load = load.map(|load| Mutex::new(LoadMetrics::new(&registry, load, detail)));
        let metrics = Metrics {
            sequences: Endpoint::ALL.map(requests),
            rejected_queue_full: rejections("queue_full"),
            rejected_tokens: rejections("tokens"),
            rejected_draining: rejections("draining"),
            rejected_too_long: rejections("too_long"),
            time_to_first_token: registry.histogram(&family::TIME_TO_FIRST_TOKEN_SECONDS, &[]),
            inter_token: registry.histogram(&family::INTER_TOKEN_LATENCY_SECONDS, &[]),
            request_duration: registry.histogram(&family::REQUEST_DURATION_SECONDS, &[]),
            request_queue: registry.histogram(&family::REQUEST_QUEUE_DURATION_SECONDS, &[]),
            request_prefill: registry.histogram(&family::REQUEST_PREFILL_DURATION_SECONDS, &[]),
            request_decode: registry.histogram(&family::REQUEST_DECODE_DURATION_SECONDS, &[]),
            request_prompt_tokens: registry.histogram(&family::REQUEST_PROMPT_TOKENS, &[]),
            request_generation_tokens: registry.histogram(&family::REQUEST_GENERATION_TOKENS, &[]),
            steps: ["prefill", "decode", "mixed"].map(step),
            step_imbalance: registry.histogram(&family::STEP_IMBALANCE_RATIO, &[]),
            ranks: RankMetrics::new(&registry, sources.ranks.len()),
            rebalancing: RebalanceMetrics::new(&registry),
            load,
            sources,
            registry,
        };
        let series = count_series(&metrics.render(&EngineStats::default()));
        if series > options.max_series {
            let why = format!(
                "expert detail \"{}\" makes {series} series, more than max_series = {}; choose a coarser detail or raise \
                 the limit",
                detail.label(),
                options.max_series
            );
            return Err(Error::config("[metrics] expert_detail", why));
        }
        Ok(metrics)
    }

    /// The page, with the engine's and the experts' counts as they are now.
    pub fn render(&self, engine: &EngineStats) -> String {
        self.registry.copy(engine);
        self.registry.copy_trace(self.sources.trace.as_deref());
        self.registry.copy_process();
        let dropped = self.sources.dropped_log_lines.load(Ordering::Relaxed);
        self.registry.counter(&family::LOG_DROPPED_LINES_TOTAL, &[]).absolute(dropped);
        self.ranks.update(&self.registry, &self.sources.ranks);
        self.with_load(LoadMetrics::count);
        self.registry.render()
    }

    /// Takes over what rebalancing did; each migration must be seen once at least.
    pub fn note_rebalancing(&self, status: &RebalanceStatus) {
        self.rebalancing.update(status);
    }

    /// Folds the samples of histograms, which otherwise pile up between two pages.
    pub fn run_upkeep(&self) {
        self.registry.run_upkeep();
    }

    /// Ends a load window: the per-layer gauges speak of it from now on.
    pub fn close_load_window(&self) {
        self.with_load(LoadMetrics::close_window);
    }

    /// Counts a response on `route`, a route's pattern or "other".
    pub(super) fn count_response(&self, route: &str, status: StatusCode) {
        self.registry.counter(&family::HTTP_RESPONSES_TOTAL, &[route, status.as_str()]).increment(1);
    }

    /// See [`Sources::row_bytes`].
    pub(super) fn row_bytes(&self) -> usize {
        self.sources.row_bytes
    }

    /// Who tells the expert load, where anybody does.
    pub(super) fn load_source(&self) -> Option<&Arc<dyn LoadSource>> {
        self.sources.load.as_ref()
    }

    /// Counts the end of a sequence.
    pub(super) fn count_sequence(&self, endpoint: Endpoint, outcome: Outcome) {
        self.sequences[endpoint as usize][outcome as usize].increment(1);
    }

    /// Counts a request that the engine did not take, where it was not at fault otherwise.
    pub(super) fn count_refusal(&self, error: &Error) {
        match error {
            Error::Busy { limit: QueueLimit::Requests, .. } => self.rejected_queue_full.increment(1),
            Error::Busy { limit: QueueLimit::Tokens, .. } => self.rejected_tokens.increment(1),
            Error::Request { message, .. } if message.starts_with(CONTEXT_PHRASE) => self.count_too_long(),
            _ => {}
        }
    }

    /// Counts a request that is longer than the context.
    pub(super) fn count_too_long(&self) {
        self.rejected_too_long.increment(1);
    }

    /// Counts a request that came during a shutdown.
    pub(super) fn count_draining_rejection(&self) {
        self.rejected_draining.increment(1);
    }

    fn with_load(&self, update: impl FnOnce(&mut LoadMetrics, crate::metrics::LoadSnapshot)) {
        if let (Some(load), Some(source)) = (&self.load, &self.sources.load) {
            update(&mut load.lock().unwrap_or_else(PoisonError::into_inner), source.snapshot());
        }
    }
}

impl TimingObserver for Metrics {
    fn on_step(&self, timing: &StepTiming) {
        let phase = match (timing.prefill_rows, timing.decode_rows) {
            (_, 0) => 0,
            (0, _) => 1,
            _ => 2,
        };
        let (duration, rows) = &self.steps[phase];
        duration.record(timing.duration);
        rows.record((timing.prefill_rows + timing.decode_rows) as f64);
        if let Some(source) = &self.sources.load {
            self.step_imbalance.record(source.step_imbalance());
        }
    }

    fn on_first_token(&self, since_submission: Duration) {
        self.time_to_first_token.record(since_submission);
    }

    fn on_next_token(&self, since_previous: Duration) {
        self.inter_token.record(since_previous);
    }

    fn on_finish(&self, timing: &RequestTiming) {
        self.request_duration.record(timing.total);
        for (histogram, part) in [
            (&self.request_queue, timing.queue),
            (&self.request_prefill, timing.prefill),
            (&self.request_decode, timing.decode),
        ] {
            // A part that was never reached has no duration.
            if let Some(time) = part {
                histogram.record(time);
            }
        }
        self.request_prompt_tokens.record(timing.prompt_tokens as f64);
        self.request_generation_tokens.record(timing.generated_tokens as f64);
    }
}

impl Registry {
    fn describe(&self, info: &Info) {
        let number = |n: usize| n.to_string();
        let one = |family, values: &[&str]| self.gauge(family, values).set(1.0);
        // Whoever builds from a checkout may say which.
        let commit = option_env!("MOEYARD_COMMIT").unwrap_or("unknown");
        one(&family::BUILD_INFO, &[env!("CARGO_PKG_VERSION"), commit, &info.backend]);
        let [layers, experts, top_k] = [info.layers, info.experts, info.top_k].map(number);
        one(&family::MODEL_INFO, &[&info.model, &info.dtype, &info.expert_dtype, &layers, &experts, &top_k]);
        let [tp, dp, ep] = [info.tp, info.dp, info.ep].map(number);
        one(&family::PARALLEL_INFO, &[&tp, &dp, &ep, &info.placement]);
        self.gauge(&family::REDUNDANT_EXPERT_SLOTS, &[]).set(info.redundant_slots as f64);
        // No expert has a capacity limit, so this is true as it stands.
        self.counter(&family::TOKENS_DROPPED_TOTAL, &[]).absolute(0);
        for (rank, memory) in info.memory.iter().enumerate() {
            for (kind, bytes) in [
                ("weights", memory.weights),
                ("kv", memory.kv),
                ("workspace", memory.workspace),
                ("redundant", memory.redundant),
            ] {
                self.gauge(&family::MEMORY_BYTES, &[&rank.to_string(), kind]).set(bytes as f64);
            }
        }
    }

    /// The engine keeps these counts itself; the page takes them over.
    fn copy(&self, stats: &EngineStats) {
        for (family, count) in [
            (&family::PROMPT_TOKENS_TOTAL, stats.prompt_tokens),
            (&family::PROMPT_CACHED_TOKENS_TOTAL, stats.cached_tokens),
            (&family::GENERATION_TOKENS_TOTAL, stats.generated_tokens),
            (&family::PREEMPTIONS_TOTAL, stats.preemptions),
            (&family::STEPS_TOTAL, stats.steps),
            (&family::NONFINITE_LOGITS_TOTAL, stats.nonfinite_logits),
            (&family::RECOMPUTED_TOKENS_TOTAL, stats.recomputed_tokens),
        ] {
            self.counter(family, &[]).absolute(count);
        }
        let kv = &stats.kv;
        for (state, blocks) in [("used", kv.used), ("free", kv.free), ("cached", kv.cached)] {
            self.gauge(&family::KV_BLOCKS, &[state]).set(blocks as f64);
        }
        let blocks = (kv.used + kv.free + kv.cached).max(1);
        self.gauge(&family::KV_CACHE_USAGE_RATIO, &[]).set(kv.used as f64 / blocks as f64);
        self.gauge(&family::REQUESTS_RUNNING, &[]).set(stats.running as f64);
        self.gauge(&family::REQUESTS_WAITING, &[]).set(stats.waiting as f64);
    }

    /// The operating system keeps these; what it does not tell stays as it was.
    fn copy_process(&self) {
        let Some(process) = process::read() else { return };
        self.set_seconds(&family::PROCESS_CPU_SECONDS_TOTAL, &[], process.cpu_seconds);
        for (family, value) in [
            (&family::PROCESS_RESIDENT_MEMORY_BYTES, process.resident_bytes as f64),
            (&family::PROCESS_VIRTUAL_MEMORY_BYTES, process.virtual_bytes as f64),
            (&family::PROCESS_OPEN_FDS, process.open_fds as f64),
            (&family::PROCESS_MAX_FDS, process.max_fds as f64),
            (&family::PROCESS_START_TIME_SECONDS, process.start_unix_seconds),
            (&family::RUNTIME_THREADS, process.threads as f64),
        ] {
            self.gauge(family, &[]).set(value);
        }
    }

    /// Zero without a trace.
    fn copy_trace(&self, trace: Option<&TraceCounters>) {
        let [errors, lost] = trace.map_or([0; 2], |trace| [trace.errors(), trace.lost_records()]);
        self.counter(&family::TRACE_ERRORS_TOTAL, &[]).absolute(errors);
        self.counter(&family::TRACE_LOST_RECORDS_TOTAL, &[]).absolute(lost);
    }
}
