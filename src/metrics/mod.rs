//! Names, kinds, labels and help texts of every metric family, as data, and what the families are filled from:
//! the expert load ([`load`]) and what each rank spends its time on ([`meter`]). What renders them is
//! `server/metrics.rs`.
//!
//! House rules, checked by the tests below: prefix `moeyard_` (`process_` for what every process has), snake case, base
//! units last in a name, `_total` on counters and nowhere else, no label whose values a client chooses.

pub mod load;
pub mod meter;

pub use load::{LoadSnapshot, LoadSource, hottest};
pub use meter::{CommOp, RankMeter, StepKind, Work, WorkClock};
pub use router_sim::load::{Phase, entropy_ratio, imbalance_ratio, max_share};

/// What a family measures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Only ever grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution over these upper bounds, ascending; `+Inf` is implied.
    Histogram(&'static [f64]),
}

/// One metric family.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Family {
    /// Full name, unit included.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// Label names, in the order in which values are given.
    pub labels: &'static [&'static str],
    /// One sentence for the HELP line.
    pub help: &'static str,
}

/// Seconds until the first token: vLLM's buckets, so that its dashboards read ours.
const FIRST_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Seconds between two tokens: vLLM's buckets, with three more for small models.
const INTER_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
];
/// Seconds of a whole request: vLLM's buckets.
const REQUEST_SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// Seconds of the parts of a request that may be short: vLLM's buckets with finer ones below.
const WAIT_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0,
    120.0, 240.0, 480.0, 960.0,
];
/// Tokens of a request: 1-2-5.
const REQUEST_TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5];
/// Seconds of one step.
const STEP_SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Seconds of one migration.
const REBALANCE_SECONDS: &[f64] =
    &[0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
/// Imbalance ratio of one step.
const IMBALANCE: &[f64] = &[0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 7.0, 15.0];
/// Tokens of one step.
const STEP_TOKENS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];

/// Declares each family as a constant and all of them as [`FAMILIES`], so that none can be left out of the page.
macro_rules! families {
    ($($ident:ident: $kind:expr, $name:literal, [$($label:literal),*], $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $ident: Family =
                Family { name: $name, kind: $kind, labels: &[$($label),*], help: $help };
        )*
        /// Every family of the page, in reading order.
        pub const FAMILIES: &[Family] = &[$($ident),*];
    };
}

families! {
    BUILD_INFO: Kind::Gauge, "moeyard_build_info", ["version", "commit", "backend"],
        "Always 1; the labels say which build this is.";
    MODEL_INFO: Kind::Gauge, "moeyard_model_info", ["model", "dtype", "expert_dtype", "layers", "experts", "top_k"],
        "Always 1; the labels say which model is served.";
    PARALLEL_INFO: Kind::Gauge, "moeyard_parallel_info", ["tp", "dp", "ep", "placement"],
        "Always 1; the labels give the parallel degrees and where the first placement came from.";
    MEMORY_BYTES: Kind::Gauge, "moeyard_memory_bytes", ["rank", "kind"],
        "Memory a rank reserved at start, by use; redundant is the part of the weights that extra expert slots hold.";
    PROCESS_CPU_SECONDS_TOTAL: Kind::Counter, "process_cpu_seconds_total", [],
        "User and system CPU time of this process.";
    PROCESS_RESIDENT_MEMORY_BYTES: Kind::Gauge, "process_resident_memory_bytes", [],
        "Memory of this process that is in RAM.";
    PROCESS_VIRTUAL_MEMORY_BYTES: Kind::Gauge, "process_virtual_memory_bytes", [],
        "Address space of this process.";
    PROCESS_OPEN_FDS: Kind::Gauge, "process_open_fds", [],
        "Open file descriptors of this process.";
    PROCESS_MAX_FDS: Kind::Gauge, "process_max_fds", [],
        "Most file descriptors that this process may open.";
    PROCESS_START_TIME_SECONDS: Kind::Gauge, "process_start_time_seconds", [],
        "Start of this process in seconds since 1970.";
    RUNTIME_THREADS: Kind::Gauge, "moeyard_runtime_threads", [],
        "Threads of this process.";

    REQUESTS_RUNNING: Kind::Gauge, "moeyard_requests_running", [],
        "Sequences that take part in steps.";
    REQUESTS_WAITING: Kind::Gauge, "moeyard_requests_waiting", [],
        "Sequences accepted but not yet admitted to a step.";
    REQUESTS_TOTAL: Kind::Counter, "moeyard_requests_total", ["endpoint", "outcome"],
        "Sequences asked for, by how they ended.";
    HTTP_RESPONSES_TOTAL: Kind::Counter, "moeyard_http_responses_total", ["route", "code"],
        "HTTP responses, by route and status code.";
    ADMISSION_REJECTIONS_TOTAL: Kind::Counter, "moeyard_admission_rejections_total", ["reason"],
        "Requests turned away: the queue was full of requests or of prompt tokens, a shutdown had begun, or the context is shorter.";

    PROMPT_TOKENS_TOTAL: Kind::Counter, "moeyard_prompt_tokens_total", [],
        "Prompt tokens of admitted sequences, those found in the prefix cache included.";
    GENERATION_TOKENS_TOTAL: Kind::Counter, "moeyard_generation_tokens_total", [],
        "Tokens generated.";
    PROMPT_CACHED_TOKENS_TOTAL: Kind::Counter, "moeyard_prompt_cached_tokens_total", [],
        "Prompt tokens found in the prefix cache.";
    TIME_TO_FIRST_TOKEN_SECONDS: Kind::Histogram(FIRST_TOKEN_SECONDS), "moeyard_time_to_first_token_seconds", [],
        "Time from the submission of a sequence to its first token.";
    INTER_TOKEN_LATENCY_SECONDS: Kind::Histogram(INTER_TOKEN_SECONDS), "moeyard_inter_token_latency_seconds", [],
        "Time between two tokens of one sequence.";
    REQUEST_DURATION_SECONDS: Kind::Histogram(REQUEST_SECONDS), "moeyard_request_duration_seconds", [],
        "Time from the submission of a sequence to its end.";
    REQUEST_QUEUE_DURATION_SECONDS: Kind::Histogram(WAIT_SECONDS), "moeyard_request_queue_duration_seconds", [],
        "Time from the submission of a sequence to its admission.";
    REQUEST_PREFILL_DURATION_SECONDS: Kind::Histogram(WAIT_SECONDS), "moeyard_request_prefill_duration_seconds", [],
        "Time from the admission of a sequence to its first token.";
    REQUEST_DECODE_DURATION_SECONDS: Kind::Histogram(REQUEST_SECONDS), "moeyard_request_decode_duration_seconds", [],
        "Time from the first token of a sequence to its end.";
    REQUEST_PROMPT_TOKENS: Kind::Histogram(REQUEST_TOKENS), "moeyard_request_prompt_tokens", [],
        "Prompt tokens per sequence.";
    REQUEST_GENERATION_TOKENS: Kind::Histogram(REQUEST_TOKENS), "moeyard_request_generation_tokens", [],
        "Generated tokens per sequence.";

    STEPS_TOTAL: Kind::Counter, "moeyard_steps_total", [],
        "Forward passes since start.";
    STEP_DURATION_SECONDS: Kind::Histogram(STEP_SECONDS), "moeyard_step_duration_seconds", ["phase"],
        "Time of one step, by what its rows were.";
    STEP_TOKENS_PER_STEP: Kind::Histogram(STEP_TOKENS), "moeyard_step_tokens", ["phase"],
        "Rows of one step over all data-parallel ranks, by what they were.";
    KV_BLOCKS: Kind::Gauge, "moeyard_kv_blocks", ["state"],
        "Blocks of the KV cache: used by sequences, free, or free but still holding a cached prefix.";
    KV_CACHE_USAGE_RATIO: Kind::Gauge, "moeyard_kv_cache_usage_ratio", [],
        "Used KV blocks over all KV blocks.";
    PREEMPTIONS_TOTAL: Kind::Counter, "moeyard_preemptions_total", [],
        "Sequences that lost their KV blocks and were computed again.";
    RECOMPUTED_TOKENS_TOTAL: Kind::Counter, "moeyard_recomputed_tokens_total", [],
        "Tokens computed once more after a preemption.";
    NONFINITE_LOGITS_TOTAL: Kind::Counter, "moeyard_nonfinite_logits_total", [],
        "Logit rows with a NaN or an infinity; each ended its sequence.";
    TRACE_ERRORS_TOTAL: Kind::Counter, "moeyard_trace_errors_total", [],
        "Failed writes of the routing trace; the first one stops the trace, not the serving.";
    LOG_DROPPED_LINES_TOTAL: Kind::Counter, "moeyard_log_dropped_lines_total", [],
        "Lines of the log that were dropped because nobody read it.";
    TRACE_LOST_RECORDS_TOTAL: Kind::Counter, "moeyard_trace_lost_records_total", [],
        "Steps and events that the routing trace could not take.";

    RANK_UP: Kind::Gauge, "moeyard_rank_up", ["rank"],
        "1 while the rank holds its model and answers steps, 0 before it is loaded and after it failed.";
    RANK_HEARTBEAT_AGE_SECONDS: Kind::Gauge, "moeyard_rank_heartbeat_age_seconds", ["rank"],
        "Time since the rank last got on with the step it works on; 0 between steps.";
    PHASE_SECONDS_TOTAL: Kind::Counter, "moeyard_phase_seconds_total", ["rank", "phase"],
        "Time a rank spent inside steps, by what it did; wait is time spent waiting for other ranks.";
    GRAPH_STEPS_TOTAL: Kind::Counter, "moeyard_graph_steps_total", ["rank", "how"],
        "Pieces of decode steps in which a GPU groups rows by itself: run launch by launch, captured into a CUDA graph, replayed from one.";
    COMM_BYTES_TOTAL: Kind::Counter, "moeyard_comm_bytes_total", ["rank", "op", "dir"],
        "Bytes of rows that a rank exchanged with other ranks; what stays on the rank is not counted.";
    STEP_IMBALANCE_RATIO: Kind::Histogram(IMBALANCE), "moeyard_step_imbalance_ratio", [],
        "Expert rows of the busiest rank over the mean, minus 1, of one step: each summed over layers.";
    TOKENS_DROPPED_TOTAL: Kind::Counter, "moeyard_tokens_dropped_total", [],
        "Tokens that an expert had no room for; 0 by design, as no expert has a capacity limit.";
    REDUNDANT_EXPERT_SLOTS: Kind::Gauge, "moeyard_redundant_expert_slots", [],
        "Expert slots per MoE layer beyond one per expert, over all ranks.";
    REBALANCES_TOTAL: Kind::Counter, "moeyard_rebalances_total", ["outcome"],
        "Rebalances: applied, failed (the placement before stayed), or looks at the load that moved nothing (skipped).";
    REBALANCE_DURATION_SECONDS: Kind::Histogram(REBALANCE_SECONDS), "moeyard_rebalance_duration_seconds", [],
        "Time of one migration, from its first byte to its last.";
    REBALANCE_MOVED_EXPERTS_TOTAL: Kind::Counter, "moeyard_rebalance_moved_experts_total", [],
        "Experts whose weights travelled to another slot.";
    REBALANCE_MOVED_BYTES_TOTAL: Kind::Counter, "moeyard_rebalance_moved_bytes_total", [],
        "Bytes of expert weights that travelled to another slot, over all ranks.";
    REBALANCE_PREDICTED_IMBALANCE_RATIO: Kind::Gauge, "moeyard_rebalance_predicted_imbalance_ratio", ["when"],
        "Imbalance that the latest decision to move experts found (before) and expected (after); 0 before the first.";
    REBALANCE_ACHIEVED_IMBALANCE_RATIO: Kind::Gauge, "moeyard_rebalance_achieved_imbalance_ratio", [],
        "Imbalance on the load that came after the latest rebalance; 0 while it is not known.";
    REBALANCE_SAMPLING_FLOOR_RATIO: Kind::Gauge, "moeyard_rebalance_sampling_floor_ratio", [],
        "Imbalance that chance alone leaves in a step of the size seen by the latest decision.";
    REBALANCE_IN_PROGRESS: Kind::Gauge, "moeyard_rebalance_in_progress", [],
        "1 while experts move, else 0.";
    REBALANCER_ENABLED: Kind::Gauge, "moeyard_rebalancer_enabled", [],
        "1 when the rebalancer looks at the load by itself, 0 when --rebalance is off.";
    REBALANCER_LOOK_AGE_SECONDS: Kind::Gauge, "moeyard_rebalancer_look_age_seconds", [],
        "Time since the rebalancer last looked at the load; 0 when it is off. It looks after steps, so it rests when they do.";
    PLACEMENT_VERSION: Kind::Gauge, "moeyard_placement_version", [],
        "Number of the placement in force; counts up with each change.";
    PLACEMENT_AGE_SECONDS: Kind::Gauge, "moeyard_placement_age_seconds", [],
        "Time since the placement in force came into force.";

    RANK_EXPERT_TOKENS_TOTAL: Kind::Counter, "moeyard_rank_expert_tokens_total", ["rank", "phase"],
        "Tokens computed by the experts of a rank, over all layers.";
    LAYER_EXPERT_TOKENS_TOTAL: Kind::Counter, "moeyard_layer_expert_tokens_total", ["layer"],
        "Tokens computed by the experts of a layer; equals tokens times top_k.";
    EXPERT_TOKENS_TOTAL: Kind::Counter, "moeyard_expert_tokens_total", ["layer", "expert"],
        "Tokens computed by one expert; with expert detail \"expert\".";
    LAYER_RANK_EXPERT_TOKENS_TOTAL: Kind::Counter, "moeyard_layer_rank_expert_tokens_total", ["layer", "rank"],
        "Tokens computed by the experts of a layer on one rank; with expert detail \"layer_rank\" or \"expert\".";
    LAYER_IMBALANCE_RATIO: Kind::Gauge, "moeyard_layer_imbalance_ratio", ["layer", "phase"],
        "Load of the busiest rank over the mean rank load, minus 1, in the last window.";
    LAYER_MAX_EXPERT_SHARE_RATIO: Kind::Gauge, "moeyard_layer_max_expert_share_ratio", ["layer"],
        "Share of a layer's tokens that its hottest expert took in the last window.";
    LAYER_ROUTING_ENTROPY_RATIO: Kind::Gauge, "moeyard_layer_routing_entropy_ratio", ["layer"],
        "Entropy of a layer's expert load over its maximum in the last window; 1 is even.";
    LAYER_HOTTEST_EXPERT: Kind::Gauge, "moeyard_layer_hottest_expert", ["layer"],
        "Id of the expert with the highest load in the last window.";
}

/// How finely expert load is put on the metrics page; each level has what those before it have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExpertDetail {
    /// Nothing by rank, layer or expert.
    Off,
    /// By rank.
    Rank,
    /// By layer, with the imbalance of the last window.
    Layer,
    /// By layer and rank.
    LayerRank,
    /// By layer and expert.
    Expert,
}

impl ExpertDetail {
    /// All levels, coarsest first.
    pub const ALL: [ExpertDetail; 5] = [
        ExpertDetail::Off,
        ExpertDetail::Rank,
        ExpertDetail::Layer,
        ExpertDetail::LayerRank,
        ExpertDetail::Expert,
    ];

    /// As flags and files spell it.
    pub fn label(self) -> &'static str {
        ["off", "rank", "layer", "layer_rank", "expert"][self as usize]
    }

    /// The default for a model: one series per expert up to [`SMALL_MODEL_EXPERTS`] of them over all layers.
    pub fn of_model(layers: usize, experts: usize) -> ExpertDetail {
        if layers.saturating_mul(experts) <= SMALL_MODEL_EXPERTS {
            ExpertDetail::Expert
        } else {
            ExpertDetail::Layer
        }
    }
}

/// Experts over all layers that still make a page one likes to read.
pub const SMALL_MODEL_EXPERTS: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_family_follows_the_naming_rules() {
        let mut seen = HashSet::new();
        for family in FAMILIES {
            let name = family.name;
            assert!(seen.insert(name), "{name} twice");
            assert!(name.starts_with("moeyard_") || name.starts_with("process_"), "{name}: prefix");
            let snake = |s: &str| s.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
            assert!(snake(name) && !name.contains("__"), "{name}: snake case");
            assert_eq!(
                name.ends_with("_total"),
                family.kind == Kind::Counter,
                "{name}: _total is for counters"
            );
            for reserved in ["_sum", "_count", "_bucket"] {
                assert!(!name.ends_with(reserved), "{name}: {reserved} belongs to histograms");
            }
            for unit in ["_ms", "_milliseconds", "_minutes", "_kb", "_mb", "_percent"] {
                assert!(!name.ends_with(unit), "{name}: {unit} is no base unit");
            }
            assert!(family.help.ends_with('.') && family.help.len() < 200, "{name}: help {:?}", family.help);
            for label in family.labels {
                assert!(
                    snake(label) && !["le", "quantile", "user", "request"].contains(label),
                    "{name}: {label}"
                );
            }
            if let Kind::Histogram(bounds) = family.kind {
                assert!(bounds.is_sorted_by(|a, b| a < b) && bounds[0] > 0.0, "{name}: {bounds:?}");
            }
        }
    }
}
