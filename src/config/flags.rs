//! What the user wrote: one field per flag, each absent unless given. The same keys, in the same spelling, make a TOML
//! file, so a setting is named, documented and parsed once.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use router_sim::rebalance::Mode;
use serde::Deserialize;

use super::secret::{self, Secret};
use super::size::ByteSize;
use crate::backend::DType;

/// Options as written, on the command line or in the file of `--config`.
#[derive(Debug, Clone, Default, PartialEq, Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RawOptions {
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS", help_heading = "HTTP")]
    pub host: Option<String>,
    /// Port to listen on; 0 takes a free one [default: 8000]
    #[arg(long, help_heading = "HTTP")]
    pub port: Option<u16>,
    /// Key that requests must show; may be repeated. On a shared machine give it in MOEYARD_API_KEY (several separated
    /// by commas) or the file instead: other users see command lines [default: no key is asked for]
    #[arg(
        long,
        value_name = "KEY",
        env = "MOEYARD_API_KEY",
        hide_env_values = true,
        value_delimiter = ',',
        help_heading = "HTTP"
    )]
    #[serde(default, deserialize_with = "secret::one_or_several")]
    pub api_key: Option<Vec<Secret>>,
    /// Render chat templates that requests bring; only for trusted clients: their steps are bounded, their memory is not
    #[arg(long, num_args = 0, default_missing_value = "true", help_heading = "HTTP")]
    pub trust_request_chat_template: Option<bool>,
    /// Name of the model in requests and answers [default: the folder's name]
    #[arg(long, value_name = "NAME", help_heading = "HTTP")]
    pub served_model_name: Option<String>,
    /// Device to compute on [default: auto]
    #[arg(long, value_enum, help_heading = "Device")]
    pub device: Option<DeviceChoice>,
    /// Type of weights and activations [default: auto, which is bf16]
    #[arg(long, value_enum, help_heading = "Device")]
    pub dtype: Option<DtypeChoice>,
    /// Hold the weights of routed and shared experts in 8 bits (int8 on a CPU, fp8 on a GPU) or 4 (int4 on a GPU) [default: in the type of
    /// the other weights]
    #[arg(long, value_enum, help_heading = "Device")]
    pub quantize: Option<QuantizeChoice>,
    /// Compute threads per rank [default: cores / ranks]
    #[arg(long, value_name = "N", help_heading = "Device")]
    pub threads: Option<usize>,
    /// Ranks that share the attention heads [default: 1]
    #[arg(long, value_name = "N", help_heading = "Parallelism")]
    pub tensor_parallel_size: Option<usize>,
    /// Groups of ranks with sequences of their own [default: what EP needs]
    #[arg(long, value_name = "N", help_heading = "Parallelism")]
    pub data_parallel_size: Option<usize>,
    /// Ranks that share the experts [default: TP x DP]
    #[arg(long, value_name = "N", help_heading = "Parallelism")]
    pub expert_parallel_size: Option<usize>,
    /// Stages of layers; only 1 for now
    #[arg(long, value_name = "N", help_heading = "Parallelism")]
    pub pipeline_parallel_size: Option<usize>,
    /// How ranks exchange rows: local copies within one device, nccl between GPUs, or auto: nccl where every rank has a GPU of its
    /// own [default: auto]
    #[arg(long, value_enum, help_heading = "Parallelism")]
    pub comm: Option<CommChoice>,
    /// An exchange between GPUs that takes longer has failed, and the server ends [default: 60]
    #[arg(long, value_name = "SECONDS", help_heading = "Parallelism")]
    pub comm_timeout: Option<u64>,
    /// Longest sequence in tokens, prompt and answer together [default: the model's, or what the KV cache holds]
    #[arg(long, value_name = "TOKENS", help_heading = "Batches and KV cache")]
    pub max_model_len: Option<usize>,
    /// Sequences in one step, per DP rank [default: 64]
    #[arg(long, value_name = "N", help_heading = "Batches and KV cache")]
    pub max_num_seqs: Option<usize>,
    /// Tokens in one step, per DP rank [default: 2048]
    #[arg(long, value_name = "TOKENS", help_heading = "Batches and KV cache")]
    pub max_num_batched_tokens: Option<usize>,
    /// Prompt tokens of one sequence in one step [default: 512]
    #[arg(long, value_name = "TOKENS", help_heading = "Batches and KV cache")]
    pub prefill_chunk_size: Option<usize>,
    /// Who goes first: arrival, or the requests' `priority` (lower first) and then arrival [default: arrival]
    #[arg(long, value_enum)]
    pub scheduling_policy: Option<PolicyChoice>,
    /// Requests that may wait; one more is answered with 429 [default: 1024]
    #[arg(long, value_name = "N")]
    pub max_queued_requests: Option<usize>,
    /// Prompt tokens of waiting requests; more are answered with 429 [default: 1048576]
    #[arg(long, value_name = "TOKENS")]
    pub max_queued_tokens: Option<usize>,
    /// A rank that is silent for this long beyond four times what such a step has taken is hung: the server ends [default: 10]
    #[arg(long, value_name = "SECONDS")]
    pub step_timeout: Option<u64>,
    /// Tokens per KV block, a multiple of 16 [default: 32]
    #[arg(long, value_name = "TOKENS", help_heading = "Batches and KV cache")]
    pub block_size: Option<usize>,
    /// Memory for the KV cache, per rank, such as 4GiB [default: from free memory]
    #[arg(long, value_name = "SIZE", help_heading = "Batches and KV cache")]
    pub kv_cache_memory: Option<ByteSize>,
    /// Compute every prompt from its start
    #[arg(long, num_args = 0, default_missing_value = "true", help_heading = "Batches and KV cache")]
    pub no_prefix_caching: Option<bool>,
    /// Extra expert slots per layer, over all ranks [default: 0]
    #[arg(long, value_name = "N", help_heading = "Experts")]
    pub redundant_experts: Option<usize>,
    /// How the rows of an expert are shared out among its replicas [default: exact]
    #[arg(long, value_enum, help_heading = "Experts")]
    pub split: Option<SplitChoice>,
    /// Experts whose weights may be on their way to a rank at once, each with memory of its own; 0 keeps every expert where
    /// it is [default: 1, or 0 with a single expert-parallel rank]
    #[arg(long, value_name = "N", help_heading = "Experts")]
    pub staging_slots: Option<usize>,
    /// Expert weights that a rank may send, and as many receive, per second, such as 200MiB [default: what a tenth of the
    /// steps' time allows]
    #[arg(long, value_name = "SIZE", help_heading = "Experts")]
    pub rebalance_bandwidth: Option<ByteSize>,
    /// When experts move by themselves: off, auto (when that is expected to pay), every=STEPS [default: auto where experts
    /// have spare slots on several ranks, else off]
    #[arg(long, value_name = "off|auto|every=STEPS", help_heading = "Experts")]
    pub rebalance: Option<Mode>,
    /// Who plans where they move [default: moeyard]
    #[arg(long, value_enum, help_heading = "Experts")]
    pub rebalance_policy: Option<RebalancePolicyChoice>,
    /// Steps of load that are planned on [default: 256]
    #[arg(long, value_name = "STEPS", help_heading = "Experts")]
    pub rebalance_window: Option<u64>,
    /// Write the placement in force to this file at the end, for --placement at the next start
    #[arg(long, value_name = "FILE", help_heading = "Experts")]
    pub save_placement: Option<PathBuf>,
    /// Placement file (JSON) to start with
    #[arg(long, value_name = "FILE", help_heading = "Experts")]
    pub placement: Option<PathBuf>,
    /// Record the routing of every step to this file
    #[arg(long, value_name = "FILE", help_heading = "Experts")]
    pub record_routing: Option<PathBuf>,
    /// Where weights come from: auto (the checkpoint), or dummy (made-up values of the model's shape, for measuring; answers are
    /// noise) [default: auto]
    #[arg(long, value_enum, help_heading = "Device")]
    pub load_format: Option<LoadFormat>,
    /// Look for NaN and infinity in the weights while loading
    #[arg(long, num_args = 0, default_missing_value = "true", help_heading = "Device")]
    pub check_weights: Option<bool>,
    /// Sampling defaults: auto (the checkpoint's generation_config.json), none, or a file [default: auto]
    #[arg(long, value_name = "auto|none|FILE", help_heading = "HTTP")]
    pub generation_config: Option<String>,
    /// Seconds that running requests may take to finish after a stop signal [default: 30]
    #[arg(long, value_name = "SECONDS", help_heading = "HTTP")]
    pub drain_timeout: Option<u64>,
    /// What /metrics shows; `[metrics]` in the file.
    #[command(flatten)]
    #[serde(default)]
    pub metrics: RawMetrics,
}

/// What the metrics page shows, as written. In the file these are keys of the table `[metrics]`.
#[derive(Debug, Clone, Default, PartialEq, Args, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawMetrics {
    /// How finely expert load is put on /metrics [default: layer, or expert for small models]
    #[arg(long = "metrics-expert-detail", value_name = "LEVEL", value_enum, help_heading = "Metrics")]
    pub expert_detail: Option<ExpertDetailChoice>,
    /// A detail that makes more series than this is refused at start [default: 20000]
    #[arg(long = "metrics-max-series", value_name = "N", help_heading = "Metrics")]
    pub max_series: Option<usize>,
}

/// `--metrics-expert-detail`; each level shows what those before it show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ExpertDetailChoice {
    /// No expert load.
    Off,
    /// Tokens by rank.
    Rank,
    /// Tokens, imbalance and hottest expert by layer.
    Layer,
    /// Tokens by layer and rank.
    LayerRank,
    /// Tokens by layer and expert.
    Expert,
}

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// The best device this build can use.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// `--quantize`: what [`crate::backend::int8`] and [`crate::backend::quantized`] make of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantizeChoice {
    /// 8 bits, with a scale per output; on a CPU
    Int8,
    /// float8_e4m3fn, with a scale per block of 128 by 128; on a GPU (checked without one: it has not run there yet)
    Fp8,
    /// 4 bits, with scale and zero per output and 128 inputs; on a GPU (likewise)
    Int4,
}

impl QuantizeChoice {
    /// As the flag spells it.
    pub fn name(self) -> &'static str {
        match self {
            QuantizeChoice::Int8 => "int8",
            QuantizeChoice::Fp8 => "fp8",
            QuantizeChoice::Int4 => "int4",
        }
    }

    /// Type of the experts' weights.
    pub fn dtype(self) -> DType {
        match self {
            QuantizeChoice::Int8 => DType::I8,
            QuantizeChoice::Fp8 => DType::F8,
            QuantizeChoice::Int4 => DType::I4x2,
        }
    }

    /// What computes them: the CPU or a GPU.
    pub fn device(self) -> DeviceChoice {
        match self {
            QuantizeChoice::Int8 => DeviceChoice::Cpu,
            QuantizeChoice::Fp8 | QuantizeChoice::Int4 => DeviceChoice::Cuda,
        }
    }

    /// "int8 experts are computed on a CPU only"
    pub fn where_computed(self) -> String {
        let device = if self.device() == DeviceChoice::Cpu { "a CPU" } else { "GPUs" };
        format!("{} experts are computed on {device} only", self.name())
    }
}

/// `--load-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadFormat {
    /// The checkpoint's safetensors files.
    #[default]
    Auto,
    /// Made-up values; the folder needs no weights.
    Dummy,
}

/// `--comm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CommChoice {
    /// NCCL where every rank has a GPU of its own, copies otherwise.
    Auto,
    /// Copies: all ranks on one device.
    Local,
    /// NCCL.
    Nccl,
}

/// `--scheduling-policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyChoice {
    /// In order of arrival.
    #[value(alias = "fcfs")]
    #[serde(alias = "fcfs")]
    Arrival,
    /// By priority.
    Priority,
}

/// `--split`: the splits of router-sim that serving can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum SplitChoice {
    /// The busiest rank gets as few rows as any split can give it; rows stay home where that costs nothing.
    Exact,
    /// Every replica gets the same number of rows: what GPUs share out by themselves in a decode step.
    Even,
    /// Replicas are poured full so that the least busy ranks rise together.
    Waterfill,
    /// Every rank sends to its nearest replica.
    Nearest,
    /// Few experts per rank are used at all, for small batches.
    Activated,
}

/// `--rebalance-policy`: the policies of router-sim that look at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum RebalancePolicyChoice {
    /// moeyard's own: few transfers, several parts of the window, prefill and decode apart.
    Moeyard,
    /// DeepSeek's balancer, over all ranks at once, from scratch each time.
    Eplb,
}

/// `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DtypeChoice {
    /// bf16, whatever the checkpoint stores.
    Auto,
    /// Single precision: what the golden outputs were made in.
    F32,
    /// bfloat16 with f32 sums.
    Bf16,
}

impl RawOptions {
    /// These options where given, else those of `file`.
    pub fn or(self, file: RawOptions) -> RawOptions {
        RawOptions {
            host: self.host.or(file.host),
            port: self.port.or(file.port),
            api_key: self.api_key.or(file.api_key),
            trust_request_chat_template: self
                .trust_request_chat_template
                .or(file.trust_request_chat_template),
            served_model_name: self.served_model_name.or(file.served_model_name),
            device: self.device.or(file.device),
            dtype: self.dtype.or(file.dtype),
            quantize: self.quantize.or(file.quantize),
            threads: self.threads.or(file.threads),
            tensor_parallel_size: self.tensor_parallel_size.or(file.tensor_parallel_size),
            data_parallel_size: self.data_parallel_size.or(file.data_parallel_size),
            expert_parallel_size: self.expert_parallel_size.or(file.expert_parallel_size),
            pipeline_parallel_size: self.pipeline_parallel_size.or(file.pipeline_parallel_size),
            comm: self.comm.or(file.comm),
            comm_timeout: self.comm_timeout.or(file.comm_timeout),
            max_model_len: self.max_model_len.or(file.max_model_len),
            max_num_seqs: self.max_num_seqs.or(file.max_num_seqs),
            max_num_batched_tokens: self.max_num_batched_tokens.or(file.max_num_batched_tokens),
            prefill_chunk_size: self.prefill_chunk_size.or(file.prefill_chunk_size),
            scheduling_policy: self.scheduling_policy.or(file.scheduling_policy),
            max_queued_requests: self.max_queued_requests.or(file.max_queued_requests),
            max_queued_tokens: self.max_queued_tokens.or(file.max_queued_tokens),
            step_timeout: self.step_timeout.or(file.step_timeout),
            block_size: self.block_size.or(file.block_size),
            kv_cache_memory: self.kv_cache_memory.or(file.kv_cache_memory),
            no_prefix_caching: self.no_prefix_caching.or(file.no_prefix_caching),
            redundant_experts: self.redundant_experts.or(file.redundant_experts),
            split: self.split.or(file.split),
            staging_slots: self.staging_slots.or(file.staging_slots),
            rebalance_bandwidth: self.rebalance_bandwidth.or(file.rebalance_bandwidth),
            rebalance: self.rebalance.or(file.rebalance),
            rebalance_policy: self.rebalance_policy.or(file.rebalance_policy),
            rebalance_window: self.rebalance_window.or(file.rebalance_window),
            save_placement: self.save_placement.or(file.save_placement),
            placement: self.placement.or(file.placement),
            record_routing: self.record_routing.or(file.record_routing),
            load_format: self.load_format.or(file.load_format),
            check_weights: self.check_weights.or(file.check_weights),
            generation_config: self.generation_config.or(file.generation_config),
            drain_timeout: self.drain_timeout.or(file.drain_timeout),
            metrics: RawMetrics {
                expert_detail: self.metrics.expert_detail.or(file.metrics.expert_detail),
                max_series: self.metrics.max_series.or(file.metrics.max_series),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: RawOptions,
    }

    fn parse(line: &str) -> RawOptions {
        Line::try_parse_from(format!("moeyard {line}").split_whitespace()).unwrap().options
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = RawOptions { port: Some(1), threads: Some(2), ..RawOptions::default() };
        let merged = parse("--port 3 --no-prefix-caching --kv-cache-memory 2MiB --dtype f32").or(file);
        let expected = RawOptions {
            port: Some(3),
            threads: Some(2),
            no_prefix_caching: Some(true),
            kv_cache_memory: Some(ByteSize(2 << 20)),
            dtype: Some(DtypeChoice::F32),
            ..RawOptions::default()
        };
        assert_eq!(merged, expected);
        let file = parse("--metrics-max-series 7 --metrics-expert-detail off");
        let both = RawMetrics { expert_detail: Some(ExpertDetailChoice::LayerRank), max_series: Some(7) };
        assert_eq!(parse("--metrics-expert-detail layer_rank").or(file).metrics, both);
        assert_eq!(parse(""), RawOptions::default());
    }

    #[test]
    fn keys_repeat_and_are_not_shown() {
        let options = parse("--api-key one --api-key two,three");
        let keys: Vec<_> = options.api_key.iter().flatten().map(Secret::reveal).collect();
        assert_eq!(keys, ["one", "two", "three"]);
        let shown = format!("{options:?}");
        assert!(!shown.contains("two") && !shown.contains("three"), "{shown}");
    }

    #[test]
    fn flags_of_other_versions_are_unknown() {
        for flag in ["--rebalance-groups 2", "--eplb-window 9", "--save-load x"] {
            let line = format!("moeyard {flag}");
            let error = Line::try_parse_from(line.split_whitespace()).err().expect(flag).to_string();
            assert!(error.contains("unexpected argument"), "{error}");
        }
    }
}
