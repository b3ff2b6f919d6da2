//! `moeyard inspect`: what a model is and what one rank of a run would hold.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use clap::Args;
use router_sim::topology::Cluster;

use super::Settings;
use super::cluster::ClusterPlan;
use super::devices;
use super::model::OpenModel;
use crate::backend::{DType, Precision, quantized};
use crate::config::size::ByteSize;
use crate::config::{Options, Parallel};
use crate::error::{Error, Problems, Result};
use crate::model::families;
use crate::spec::{Attention, FeedForward, ModelSpec};

/// What a report needs to know about a run besides the model.
#[derive(Debug, Clone, Copy)]
pub struct RunShape {
    /// Parallel degrees.
    pub parallel: Parallel,
    /// Expert slots per rank and MoE layer.
    pub slots_per_rank: usize,
    /// Experts that may be on their way to a rank at once.
    pub staging_slots: usize,
    /// Types of weights, of experts and of the KV cache.
    pub precision: Precision,
    /// Tokens per KV block.
    pub block_size: usize,
}

/// `moeyard inspect`.
#[derive(Args)]
pub(super) struct Arguments {
    /// Checkpoint folder in Hugging Face layout, or a config.json alone [default: the embedded demo model]
    #[arg(value_name = "MODEL_DIR")]
    model: Option<PathBuf>,
    /// Plan the run on the cluster that this file describes (configs/clusters has some)
    #[arg(long, value_name = "FILE")]
    cluster: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// Prints the report of a model under the given flags, and with a cluster what it comes to there. Reads headers only.
pub(super) fn run(arguments: Arguments) -> Result<()> {
    let raw = arguments.settings.read()?;
    let spec = spec(arguments.model.as_deref())?;
    let cluster = arguments.cluster.as_deref().map(Cluster::read).transpose()?;
    let options = Options::resolve(raw.clone(), &spec, available_parallelism().map_or(1, usize::from))?;
    let shape = RunShape {
        parallel: options.parallel,
        slots_per_rank: options.experts.slots_per_rank,
        staging_slots: options.experts.staging_slots,
        precision: options.model.precision(&spec.moe.router),
        block_size: options.cache.block_size,
    };
    print!("{}", report(&spec, &shape));
    match cluster {
        Some(cluster) => print!(
            "
{}",
            ClusterPlan::new(&spec, &raw, &cluster)?
        ),
        None => print!("{}", devices::report(&options.model, options.parallel.world)),
    }
    Ok(())
}

/// What a model is: of a whole checkpoint, whose headers are checked as well, or of a config.json without weights.
fn spec(model: Option<&Path>) -> Result<ModelSpec> {
    let config = match model {
        Some(file) if file.is_file() => file.to_owned(),
        Some(folder) if has_weights(folder)? => return Ok(OpenModel::open(model)?.family.spec),
        Some(folder) => folder.join("config.json"),
        None => return Ok(OpenModel::open(None)?.family.spec),
    };
    let bytes = std::fs::read(&config).map_err(|e| Error::io(&config, e))?;
    match families::resolve(&bytes) {
        Ok(family) => Ok(family.spec),
        Err(Error::Checkpoint(problems)) => {
            Err(Error::Checkpoint(Problems { checkpoint: config.display().to_string(), ..problems }))
        }
        Err(other) => Err(other),
    }
}

/// Whether a folder holds more of a checkpoint than its configuration.
fn has_weights(folder: &Path) -> Result<bool> {
    let files = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let mut names = files.filter_map(|file| file.ok()?.file_name().into_string().ok());
    Ok(names.any(|name| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")))
}

/// The report: one `label: value` per line, bytes without the padding a backend may add.
pub fn report(spec: &ModelSpec, run: &RunShape) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        writeln!(text, "{:<20}{value}", format!("{label}:")).expect("a String takes all");
    };
    let all = spec.parameters();
    line("family", spec.family.to_owned());
    line("layers", layers(spec));
    line("attention", attention(&spec.attention));
    line("hidden size", spec.hidden_size.to_string());
    line("vocabulary", spec.vocab_size.to_string());
    line("context", format!("{} tokens", spec.max_position_embeddings));
    line("experts", experts(spec));
    line("total parameters", parameters(all.total()));
    line("active parameters", format!("{} per token", parameters(spec.active_parameters())));

    let Parallel { tp, dp, ep, expert_tp, world } = run.parallel;
    line("ranks", format!("{world} (TP {tp}, DP {dp}, EP {ep}, tensor split inside an expert {expert_tp})"));
    line("slots per rank", format!("{} per MoE layer", run.slots_per_rank));
    let rank = spec.rank_parameters(run.parallel.split(run.slots_per_rank));
    let of_type = quantized::bytes_of;
    let bytes = |numbers: u64, dtype: DType| ByteSize(of_type(numbers, dtype)).to_string();
    let Precision { weights, activations, experts } = run.precision;
    let kv_token = spec.kv_numbers_per_token(tp);
    let of_experts = rank.experts + rank.shared;
    let total = of_type(rank.total() - of_experts, weights).saturating_add(of_type(of_experts, experts));
    line("bytes per rank", ByteSize(total).to_string());
    for (label, numbers, dtype) in [
        ("  attention", rank.attention, weights),
        ("  experts", rank.experts, experts),
        ("  shared experts", rank.shared, experts),
        ("  dense MLPs", rank.dense, weights),
        ("  routers", rank.router, weights),
        ("  embedding", rank.embedding, weights),
        ("  head", rank.head, weights),
        ("  norms", rank.norms, weights),
    ] {
        line(label, bytes(numbers, dtype));
    }
    if run.staging_slots > 0 {
        let one = spec.rank_parameters(run.parallel.split(1)).experts / spec.moe_layers().len().max(1) as u64;
        let staging = bytes(one.saturating_mul(run.staging_slots as u64), experts);
        line("staging per rank", format!("{staging} (room for {} on their way)", run.staging_slots));
    }
    line("KV per token", bytes(kv_token, activations));
    let block = bytes(kv_token.saturating_mul(run.block_size as u64), activations);
    line("KV per block", format!("{block} ({} tokens)", run.block_size));
    text
}

fn layers(spec: &ModelSpec) -> String {
    let moe = spec.moe_layers().len();
    let all = spec.layers.len();
    let dense = spec.layers.iter().find_map(|layer| match layer.ffn {
        FeedForward::Dense { intermediate } => Some(intermediate),
        FeedForward::Moe => None,
    });
    match dense {
        Some(width) => format!("{all} ({moe} MoE, {} dense of width {width})", all - moe),
        None => format!("{all} (all MoE)"),
    }
}

fn attention(attention: &Attention) -> String {
    match *attention {
        Attention::Gqa { heads, kv_heads, head_dim, .. } => {
            format!("{heads} heads, {kv_heads} KV heads, head width {head_dim}")
        }
        Attention::Mla { heads, kv_lora_rank, rope_dim, .. } => {
            format!("{heads} latent heads, latent width {kv_lora_rank} + rotary {rope_dim}")
        }
    }
}

fn experts(spec: &ModelSpec) -> String {
    let moe = &spec.moe;
    let shared = moe.shared.map_or(String::new(), |s| format!(", a shared one of width {}", s.intermediate));
    format!("{} of width {}, {} chosen per token{shared}", moe.experts, moe.intermediate, moe.top_k)
}

/// "46702792704 (46.7 B)"
fn parameters(n: u64) -> String {
    let short = match n {
        0..1_000_000 => return n.to_string(),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.1} B", n as f64 / 1e9),
    };
    format!("{n} ({short})")
}
