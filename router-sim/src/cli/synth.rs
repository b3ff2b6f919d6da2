//! `router-sim synth`: traffic that is made up.

use std::path::PathBuf;

use clap::Args;
use router_sim::formats::Input;
use router_sim::load::Phase;
use router_sim::synth::{Bursts, Popularity, Recipe, SynthTokens};
use router_sim::{Error, Result};

use super::input::PhaseFlag;
use super::output::{Target, Written, write_record};

const EXAMPLES: &str = "\
Popularity: uniform, lognormal:SIGMA or zipf:EXPONENT. Real records are close to lognormal:0.65 (DeepSeek-V3) to
lognormal:1.6 (Gemma), far from zipf:1.

Examples:
  router-sim synth traffic.moeroute --like deepseek-v3 --ranks 32 --steps 200
  router-sim synth load.npy --like qwen3-235b --ranks 16 --sum
  router-sim synth drifting.moeroute --like deepseek-v3 --ranks 32 --drift 0.25 --topics 8
  router-sim synth bursts.csv --experts 64 --layers 24 --top-k 6 --bursts 0.02:10:5
  router-sim synth big.npy --layers 61 --experts 384 --top-k 8 --ranks 1024 --tokens-per-rank 8 --steps 100";

/// Popularity that real models show, where it is known.
const LIKE: [Like; 4] = [
    Like {
        name: "deepseek-v3",
        first_layer: 3,
        layers: 58,
        experts: 256,
        top_k: 8,
        groups: 8,
        top_groups: 4,
        sigma: 0.65,
    },
    Like {
        name: "qwen3-235b",
        first_layer: 0,
        layers: 94,
        experts: 128,
        top_k: 8,
        groups: 1,
        top_groups: 1,
        sigma: 0.65,
    },
    Like {
        name: "gpt-oss-20b",
        first_layer: 0,
        layers: 24,
        experts: 32,
        top_k: 4,
        groups: 1,
        top_groups: 1,
        sigma: 0.5,
    },
    Like {
        name: "mixtral-8x7b",
        first_layer: 0,
        layers: 32,
        experts: 8,
        top_k: 2,
        groups: 1,
        top_groups: 1,
        sigma: 0.3,
    },
];

/// Shape and popularity of a model.
struct Like {
    name: &'static str,
    first_layer: usize,
    layers: usize,
    experts: usize,
    top_k: usize,
    groups: usize,
    top_groups: usize,
    sigma: f64,
}

/// What to make.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// File to write; its extension says the format unless --output-format does
    #[arg(value_name = "OUTPUT")]
    to: PathBuf,
    /// Write this format
    #[arg(long, value_name = "FORMAT", value_parser = Target::parse)]
    output_format: Option<Target>,
    /// Loads: one window over all steps
    #[arg(long, conflicts_with = "window")]
    sum: bool,
    /// Loads: so many steps to a window
    #[arg(long, value_name = "STEPS", default_value_t = 1)]
    window: u64,
    /// Start from the shape and the unevenness of this model; other flags win
    #[arg(long, value_name = "MODEL", value_parser = clap::builder::PossibleValuesParser::new(LIKE.map(|like| like.name)))]
    like: Option<String>,
    /// MoE layers [default: 16]
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Index of the first MoE layer in the model [default: 0]
    #[arg(long, value_name = "N")]
    first_layer: Option<usize>,
    /// Experts per layer [default: 64]
    #[arg(long, value_name = "N")]
    experts: Option<usize>,
    /// Experts per token [default: 8]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Groups of experts, for group-limited routing [default: 1]
    #[arg(long, value_name = "N")]
    groups: Option<usize>,
    /// Groups that one token may go to [default: all]
    #[arg(long, value_name = "N")]
    top_groups: Option<usize>,
    /// Ranks that own the tokens
    #[arg(long, value_name = "N", default_value_t = 8)]
    ranks: usize,
    /// Tokens of each rank in a step
    #[arg(long, value_name = "N", default_value_t = 64)]
    tokens_per_rank: usize,
    /// Steps
    #[arg(long, value_name = "N", default_value_t = 100)]
    steps: u64,
    /// Prefill: consecutive tokens of few requests; decode: each token of another one
    #[arg(long, value_name = "PHASE", default_value = "decode")]
    phase: PhaseFlag,
    /// Tokens of a request in this phase
    #[arg(long, value_name = "N", default_value_t = 512)]
    request_tokens: u64,
    /// How uneven experts are [default: lognormal:0.65]
    #[arg(long, value_name = "POPULARITY", value_parser = popularity)]
    popularity: Option<Popularity>,
    /// Topics; a request keeps its topic
    #[arg(long, value_name = "N", default_value_t = 1)]
    topics: usize,
    /// How much topics differ: standard deviation of log popularity
    #[arg(long, value_name = "SIGMA", default_value_t = 0.5)]
    topic_sigma: f64,
    /// Drift: standard deviation of log popularity gained within 100 steps
    #[arg(long, value_name = "SIGMA", default_value_t = 0.0)]
    drift: f64,
    /// Bursts: chance per layer and step, times which one expert is hotter, steps
    #[arg(long, value_name = "RATE:FACTOR:STEPS", value_parser = bursts)]
    bursts: Option<Bursts>,
    /// Of everything that is drawn
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

fn popularity(text: &str) -> Result<Popularity, String> {
    let (name, number) = text.split_once(':').map_or((text, None), |(name, number)| (name, Some(number)));
    let number = number.map(|n| n.parse::<f64>().map_err(|_| format!("{n:?} is no number"))).transpose()?;
    match (name, number) {
        ("uniform", None) => Ok(Popularity::Uniform),
        ("lognormal", Some(sigma)) => Ok(Popularity::LogNormal(sigma)),
        ("zipf", Some(exponent)) => Ok(Popularity::Zipf(exponent)),
        _ => Err("expected uniform, lognormal:SIGMA or zipf:EXPONENT".into()),
    }
}

fn bursts(text: &str) -> Result<Bursts, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let parsed = match parts[..] {
        [rate, factor, steps] => rate.parse().ok().zip(factor.parse().ok()).zip(steps.parse().ok()),
        _ => None,
    };
    let ((rate, factor), steps) = parsed.ok_or("expected RATE:FACTOR:STEPS, 0.02:10:5 for instance")?;
    Ok(Bursts { rate, factor, steps })
}

impl Arguments {
    fn recipe(&self) -> Result<Recipe> {
        let like = self.like.as_deref().and_then(|name| LIKE.iter().find(|like| like.name == name));
        let of = |given: Option<usize>, field: fn(&Like) -> usize, default| {
            given.unwrap_or_else(|| like.map_or(default, field))
        };
        let layers = of(self.layers, |like| like.layers, 16);
        let first = of(self.first_layer, |like| like.first_layer, 0);
        let groups = of(self.groups, |like| like.groups, 1);
        let limit = like.filter(|_| self.groups.is_none()).map_or(groups, |like| like.top_groups);
        let end = first.checked_add(layers).filter(|end| *end <= 1 << 20);
        let end = end.ok_or_else(|| {
            Error::Impossible(format!("{layers} layers from {first} on exceed the limit of {}", 1 << 20))
        })?;
        Ok(Recipe {
            model: self.like.clone().unwrap_or_else(|| "synthetic".to_owned()),
            layer_ids: (first..end).collect(),
            experts: of(self.experts, |like| like.experts, 64),
            top_k: of(self.top_k, |like| like.top_k, 8),
            groups,
            top_groups: self.top_groups.unwrap_or(limit),
            ranks: self.ranks,
            tokens_per_rank: self.tokens_per_rank,
            steps: self.steps,
            phase: match self.phase {
                PhaseFlag::Prefill => Phase::Prefill,
                PhaseFlag::Decode => Phase::Decode,
            },
            request_tokens: self.request_tokens,
            popularity: self
                .popularity
                .unwrap_or(Popularity::LogNormal(like.map_or(0.65, |like| like.sigma))),
            topics: self.topics,
            topic_sigma: self.topic_sigma,
            drift: self.drift,
            bursts: self.bursts,
            seed: self.seed,
        })
    }
}

pub fn run(arguments: Arguments) -> Result<()> {
    let target = match arguments.output_format {
        Some(target) => target,
        None => Target::by_extension(&arguments.to, false)?,
    };
    let Target::Record(format) = target else {
        let why = "traffic is no placement; `router-sim place` makes one".to_owned();
        return Err(Error::File { path: arguments.to, why });
    };
    let tokens = SynthTokens::new(arguments.recipe()?)?;
    let per_window = if arguments.sum { u64::MAX } else { arguments.window };
    let Written { what, .. } =
        write_record(&arguments.to, format, Input::Tokens(Box::new(tokens)), per_window)?;
    super::print(&format!("{}: {what}\n", arguments.to.display()))
}
