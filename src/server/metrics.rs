//! Fills the families of [`crate::metrics`] and renders them for Prometheus. The recorder is the server's own, not the
//! process's, so that several servers can live in one process.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::StatusCode;
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use router_sim::trace::TraceCounters;

use super::load_metrics::LoadMetrics;
use crate::engine::stats::{RequestTiming, StepTiming};
use crate::engine::{EngineStats, TimingObserver};
use crate::error::{Error, Result};
use crate::metrics::{self as family, FAMILIES, Family, Kind, LoadSource};

/// What the information families say; all of it is known at start.
#[derive(Debug, Clone, Default)]
pub struct Info {
    /// Device kind, "cpu".
    pub backend: String,
    /// Served model name.
    pub model: String,
    /// Computation type, "bf16".
    pub dtype: String,
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
    /// Memory of each rank in bytes, by use ("weights", "kv", "workspace").
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
    ("/health", &[200, 503]),
    ("/version", &[200]),
    ("/metrics", &[200]),
    ("other", &[404]),
];

/// The only endpoint that runs sequences so far.
const COMPLETIONS: &str = "completions";

/// A server's metrics. The engine reports durations to it as its [`TimingObserver`].
pub struct Metrics {
    registry: Registry,
    sequences: [Counter; Outcome::ALL.len()],
    rejected_queue_full: Counter,
    rejected_draining: Counter,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    request_duration: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    /// Duration and rows of steps that were prefill, decode, mixed.
    steps: [(Histogram, Histogram); 3],
    /// A std lock: taken once per page and per window, never across an await.
    load: Option<Mutex<LoadMetrics>>,
    source: Option<Arc<dyn LoadSource>>,
    trace: Option<Arc<TraceCounters>>,
}

impl Metrics {
    /// Metrics of a server with this model; `source` tells the expert load, `trace` what becomes of the
    /// routing trace.
    ///
    /// # Errors
    /// [`Error::Config`] when a family of [`FAMILIES`] is not renderable.
    pub fn new(
        info: &Info,
        source: Option<Arc<dyn LoadSource>>,
        trace: Option<Arc<TraceCounters>>,
    ) -> Result<Self> {
        let registry = Registry::new()?;
        registry.describe(info);
        let requests = |name| registry.counter(&family::REQUESTS_TOTAL, &[COMPLETIONS, name]);
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
        let load = source.as_ref().map(|source| Mutex::new(LoadMetrics::new(&registry, source.snapshot())));
        Ok(Metrics {
            sequences: Outcome::ALL.map(|(_, name)| requests(name)),
            rejected_queue_full: rejections("queue_full"),
            rejected_draining: rejections("draining"),
            time_to_first_token: registry.histogram(&family::TIME_TO_FIRST_TOKEN_SECONDS, &[]),
            inter_token: registry.histogram(&family::INTER_TOKEN_LATENCY_SECONDS, &[]),
            request_duration: registry.histogram(&family::REQUEST_DURATION_SECONDS, &[]),
            request_prompt_tokens: registry.histogram(&family::REQUEST_PROMPT_TOKENS, &[]),
            request_generation_tokens: registry.histogram(&family::REQUEST_GENERATION_TOKENS, &[]),
            steps: ["prefill", "decode", "mixed"].map(step),
            load,
            source,
            trace,
            registry,
        })
    }

    /// The page, with the engine's and the experts' counts as they are now.
    pub fn render(&self, engine: &EngineStats) -> String {
        self.registry.copy(engine);
        self.registry.copy_trace(self.trace.as_deref());
        self.with_load(LoadMetrics::count);
        self.registry.render()
    }

    /// Folds the samples of histograms, which otherwise pile up between two pages.
    pub fn run_upkeep(&self) {
        self.registry.handle.run_upkeep();
    }

    /// Ends a load window: the per-layer gauges speak of it from now on.
    pub fn close_load_window(&self) {
        self.with_load(LoadMetrics::close_window);
    }

    /// Counts a response on `route`, a route's pattern or "other".
    pub(super) fn count_response(&self, route: &str, status: StatusCode) {
        self.registry.counter(&family::HTTP_RESPONSES_TOTAL, &[route, status.as_str()]).increment(1);
    }

    /// Counts the end of a sequence.
    pub(super) fn count_sequence(&self, outcome: Outcome) {
        self.sequences[outcome as usize].increment(1);
    }

    /// Counts a valid request that the engine could not take.
    pub(super) fn count_refusal(&self, error: &Error) {
        if matches!(error, Error::Busy { .. }) {
            self.rejected_queue_full.increment(1);
        }
    }

    /// Counts a request that came during a shutdown.
    pub(super) fn count_draining_rejection(&self) {
        self.rejected_draining.increment(1);
    }

    fn with_load(&self, update: impl FnOnce(&mut LoadMetrics, crate::metrics::LoadSnapshot)) {
        if let (Some(load), Some(source)) = (&self.load, &self.source) {
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
    }

    fn on_first_token(&self, since_submission: Duration) {
        self.time_to_first_token.record(since_submission);
    }

    fn on_next_token(&self, since_previous: Duration) {
        self.inter_token.record(since_previous);
    }

    fn on_finish(&self, timing: &RequestTiming) {
        self.request_duration.record(timing.total);
        self.request_prompt_tokens.record(timing.prompt_tokens as f64);
        self.request_generation_tokens.record(timing.generated_tokens as f64);
    }
}

/// The Prometheus recorder, spoken to in families.
pub(super) struct Registry {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
}

impl Registry {
    pub(super) fn new() -> Result<Self> {
        let refused =
            |family: &Family, why: &dyn std::fmt::Display| Error::config(family.name, why.to_string());
        let mut builder = PrometheusBuilder::new();
        for family in FAMILIES {
            // Without buckets the exporter would render a summary.
            if let Kind::Histogram(bounds) = family.kind {
                let matcher = Matcher::Full(family.name.into());
                builder =
                    builder.set_buckets_for_metric(matcher, bounds).map_err(|why| refused(family, &why))?;
            }
        }
        let recorder = builder.build_recorder();
        for family in FAMILIES {
            let (name, help) = (KeyName::from_const_str(family.name), family.help.into());
            match family.kind {
                Kind::Counter => recorder.describe_counter(name, None, help),
                Kind::Gauge => recorder.describe_gauge(name, None, help),
                Kind::Histogram(_) => recorder.describe_histogram(name, None, help),
            }
        }
        Ok(Registry { handle: recorder.handle(), recorder })
    }

    /// The page as it stands.
    pub(super) fn render(&self) -> String {
        self.handle.render()
    }

    /// The counter of `family` with these label values.
    pub(super) fn counter(&self, family: &Family, values: &[&str]) -> Counter {
        assert_eq!(family.kind, Kind::Counter, "{}", family.name);
        self.recorder.register_counter(&key(family, values), &METADATA)
    }

    /// The gauge of `family` with these label values.
    pub(super) fn gauge(&self, family: &Family, values: &[&str]) -> Gauge {
        assert_eq!(family.kind, Kind::Gauge, "{}", family.name);
        self.recorder.register_gauge(&key(family, values), &METADATA)
    }

    /// The histogram of `family` with these label values.
    pub(super) fn histogram(&self, family: &Family, values: &[&str]) -> Histogram {
        assert!(matches!(family.kind, Kind::Histogram(_)), "{}", family.name);
        self.recorder.register_histogram(&key(family, values), &METADATA)
    }

    fn describe(&self, info: &Info) {
        let number = |n: usize| n.to_string();
        let one = |family, values: &[&str]| self.gauge(family, values).set(1.0);
        one(&family::BUILD_INFO, &[env!("CARGO_PKG_VERSION"), &info.backend]);
        let [layers, experts, top_k] = [info.layers, info.experts, info.top_k].map(number);
        one(&family::MODEL_INFO, &[&info.model, &info.dtype, &layers, &experts, &top_k]);
        let [tp, dp, ep] = [info.tp, info.dp, info.ep].map(number);
        one(&family::PARALLEL_INFO, &[&tp, &dp, &ep]);
        for (rank, memory) in info.memory.iter().enumerate() {
            for (kind, bytes) in
                [("weights", memory.weights), ("kv", memory.kv), ("workspace", memory.workspace)]
            {
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

    /// Zero without a trace.
    fn copy_trace(&self, trace: Option<&TraceCounters>) {
        let [errors, lost] = trace.map_or([0; 2], |trace| [trace.errors(), trace.lost_records()]);
        self.counter(&family::TRACE_ERRORS_TOTAL, &[]).absolute(errors);
        self.counter(&family::TRACE_LOST_RECORDS_TOTAL, &[]).absolute(lost);
    }
}

/// The recorder filters by nothing of this.
static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

fn key(family: &Family, values: &[&str]) -> Key {
    assert_eq!(
        family.labels.len(),
        values.len(),
        "{}: labels {:?}, values {values:?}",
        family.name,
        family.labels
    );
    let labels = family.labels.iter().zip(values).map(|(name, value)| Label::new(*name, (*value).to_owned()));
    Key::from_parts(family.name, labels.collect::<Vec<_>>())
}
