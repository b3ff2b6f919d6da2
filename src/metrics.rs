//! Names, kinds, labels and help texts of every metric family, as data, and the plain snapshot of expert load from
//! which the load families are filled. What renders them is `server/metrics.rs`.
//!
//! House rules, checked by the tests below: prefix `moeyard_`, snake case, base units last in a name, `_total` on
//! counters and nowhere else, no label whose values a client chooses.

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
/// Tokens of a request: 1-2-5.
const REQUEST_TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5];
/// Seconds of one step.
const STEP_SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
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
    BUILD_INFO: Kind::Gauge, "moeyard_build_info", ["version", "backend"],
        "Always 1; the labels say which build this is.";
    MODEL_INFO: Kind::Gauge, "moeyard_model_info", ["model", "dtype", "layers", "experts", "top_k"],
        "Always 1; the labels say which model is served.";
    PARALLEL_INFO: Kind::Gauge, "moeyard_parallel_info", ["tp", "dp", "ep"],
        "Always 1; the labels give the parallel degrees.";
    MEMORY_BYTES: Kind::Gauge, "moeyard_memory_bytes", ["rank", "kind"],
        "Memory a rank reserved at start, by use.";

    REQUESTS_RUNNING: Kind::Gauge, "moeyard_requests_running", [],
        "Sequences that take part in steps.";
    REQUESTS_WAITING: Kind::Gauge, "moeyard_requests_waiting", [],
        "Sequences accepted but not yet admitted to a step.";
    REQUESTS_TOTAL: Kind::Counter, "moeyard_requests_total", ["endpoint", "outcome"],
        "Sequences asked for, by how they ended.";
    HTTP_RESPONSES_TOTAL: Kind::Counter, "moeyard_http_responses_total", ["route", "code"],
        "HTTP responses, by route and status code.";
    ADMISSION_REJECTIONS_TOTAL: Kind::Counter, "moeyard_admission_rejections_total", ["reason"],
        "Requests turned away although they were valid.";

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
    TRACE_LOST_RECORDS_TOTAL: Kind::Counter, "moeyard_trace_lost_records_total", [],
        "Steps and events that the routing trace could not take.";

    RANK_EXPERT_TOKENS_TOTAL: Kind::Counter, "moeyard_rank_expert_tokens_total", ["rank", "phase"],
        "Tokens computed by the experts of a rank, over all layers.";
    LAYER_EXPERT_TOKENS_TOTAL: Kind::Counter, "moeyard_layer_expert_tokens_total", ["layer"],
        "Tokens computed by the experts of a layer; equals tokens times top_k.";
    EXPERT_TOKENS_TOTAL: Kind::Counter, "moeyard_expert_tokens_total", ["layer", "expert"],
        "Tokens computed by one expert; only where layers times experts is small.";
    LAYER_IMBALANCE_RATIO: Kind::Gauge, "moeyard_layer_imbalance_ratio", ["layer", "phase"],
        "Load of the busiest rank over the mean rank load, minus 1, in the last window.";
    LAYER_MAX_EXPERT_SHARE_RATIO: Kind::Gauge, "moeyard_layer_max_expert_share_ratio", ["layer"],
        "Share of a layer's tokens that its hottest expert took in the last window.";
    LAYER_ROUTING_ENTROPY_RATIO: Kind::Gauge, "moeyard_layer_routing_entropy_ratio", ["layer"],
        "Entropy of a layer's expert load over its maximum in the last window; 1 is even.";
    LAYER_HOTTEST_EXPERT: Kind::Gauge, "moeyard_layer_hottest_expert", ["layer"],
        "Id of the expert with the highest load in the last window.";
}

/// Expert load of the whole world since start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadSnapshot {
    /// Absolute indices of the MoE layers, ascending.
    pub layer_ids: Vec<usize>,
    /// Logical experts per layer.
    pub experts: usize,
    /// Expert-parallel ranks.
    pub ranks: usize,
    /// `[phase][layer][expert]`: tokens routed to each expert.
    pub by_expert: Vec<u64>,
    /// `[phase][layer][rank]`: the same tokens by the rank that computed them.
    pub by_rank: Vec<u64>,
}

impl LoadSnapshot {
    /// All counts zero.
    pub fn zeros(layer_ids: Vec<usize>, experts: usize, ranks: usize) -> Self {
        let rows = Phase::ALL.len() * layer_ids.len();
        LoadSnapshot {
            layer_ids,
            experts,
            ranks,
            by_expert: vec![0; rows * experts],
            by_rank: vec![0; rows * ranks],
        }
    }

    /// Tokens of each expert in MoE layer number `layer` (an index into [`Self::layer_ids`]).
    pub fn experts_of(&self, phase: Phase, layer: usize) -> &[u64] {
        let first = (phase as usize * self.layer_ids.len() + layer) * self.experts;
        &self.by_expert[first..first + self.experts]
    }

    /// Tokens of each rank in MoE layer number `layer`.
    pub fn ranks_of(&self, phase: Phase, layer: usize) -> &[u64] {
        let first = (phase as usize * self.layer_ids.len() + layer) * self.ranks;
        &self.by_rank[first..first + self.ranks]
    }

    /// Tokens of each expert of a layer, both phases.
    pub fn layer_experts(&self, layer: usize) -> Vec<u64> {
        let [prefill, decode] = Phase::ALL.map(|phase| self.experts_of(phase, layer));
        prefill.iter().zip(decode).map(|(a, b)| a + b).collect()
    }

    /// Tokens of a rank over all layers.
    pub fn rank_total(&self, rank: usize, phase: Phase) -> u64 {
        (0..self.layer_ids.len()).map(|layer| self.ranks_of(phase, layer)[rank]).sum()
    }

    /// What was added since `earlier`, a snapshot of the same world. A count that went back counts as 0.
    pub fn since(&self, earlier: &LoadSnapshot) -> LoadSnapshot {
        let shape = |s: &LoadSnapshot| (s.layer_ids.len(), s.experts, s.ranks);
        assert_eq!(shape(self), shape(earlier), "layers, experts and ranks of two snapshots");
        let minus =
            |now: &[u64], then: &[u64]| now.iter().zip(then).map(|(n, t)| n.saturating_sub(*t)).collect();
        LoadSnapshot {
            by_expert: minus(&self.by_expert, &earlier.by_expert),
            by_rank: minus(&self.by_rank, &earlier.by_rank),
            ..self.clone()
        }
    }
}

/// Who can tell the expert load: the MoE layers in a running server, a table in tests.
pub trait LoadSource: Send + Sync {
    /// Counts since start. Shape and order never change while the process lives; counts never go back. Called about
    /// once a second from a thread that runs no model.
    fn snapshot(&self) -> LoadSnapshot;
}

/// Index of the highest load, the lowest among equals; 0 for an empty slice.
pub fn hottest(loads: &[u64]) -> usize {
    loads.iter().enumerate().fold(0, |best, (i, &load)| if load > loads[best] { i } else { best })
}

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
            assert!(name.starts_with("moeyard_"), "{name}: prefix");
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

    fn two_ranks() -> LoadSnapshot {
        let mut load = LoadSnapshot::zeros(vec![1, 3], 3, 2);
        load.by_expert = vec![1, 2, 3, 4, 5, 6, 10, 20, 30, 40, 50, 60];
        load.by_rank = vec![3, 3, 4, 11, 30, 30, 40, 110];
        load
    }

    #[test]
    fn rows_are_found() {
        let load = two_ranks();
        assert_eq!(load.experts_of(Phase::Decode, 1), [40, 50, 60]);
        assert_eq!(load.ranks_of(Phase::Prefill, 1), [4, 11]);
        assert_eq!(load.layer_experts(0), [11, 22, 33]);
        assert_eq!(load.rank_total(0, Phase::Decode), 70);
    }

    #[test]
    fn a_window_is_the_difference_of_two_snapshots() {
        let then = two_ranks();
        let mut now = two_ranks();
        now.by_expert[2] += 7;
        now.by_rank[1] += 7;
        let window = now.since(&then);
        assert_eq!(window.rank_total(1, Phase::Prefill), 7);
        assert_eq!(window.rank_total(0, Phase::Prefill), 0);
        assert_eq!(window.layer_experts(0), [0, 0, 7]);
    }

    #[test]
    fn the_hottest_expert_is_the_first_of_equals() {
        for (loads, hot) in [(&[0, 8, 0][..], 1), (&[1, 3, 3][..], 1), (&[0, 0][..], 0), (&[][..], 0)] {
            assert_eq!(hottest(loads), hot, "{loads:?}");
        }
    }
}
