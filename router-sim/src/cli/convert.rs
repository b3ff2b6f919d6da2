//! `router-sim convert`: records and placements of one tool to those of another.

use std::path::{Path, PathBuf};

use clap::Args;
use router_sim::Result;
use router_sim::formats::placements::{self, Missing, PlacementFormat};
use router_sim::formats::{self, Format};

use super::input::{InputFlags, tell_skipped};
use super::output::{Target, Written, write_record};

const FORMATS: &str = "\
Formats of tokens (the experts of each token):
  trace             moeyard's routing trace                                        read, written (.moeroute)
  tokens-jsonl      a JSON line per token, moeyard's form                          read, written (.jsonl)
  routed-npy        expert ids [tokens, layers, top_k], vLLM's routed_experts      read, written
  routed-npz        the same in an archive, with request_id or file_id [tokens]    read
  route-jsonl       a JSON line per token and layer, or per batch and layer        read
  moetrace          the demo models' traces                                        read
  sglang-pt         SGLang's recorder, mode per_token                              read
  parquet           lists of expert ids (a build with --features parquet)          read

Formats of loads (counts per expert):
  load-npy          [steps?, layers, experts]                                      read, written (.npy)
  load-npz          the same in an archive                                         read
  load-safetensors  a tensor `load`                                                read, written (.safetensors)
  load-csv          step,layer,e0,e1,... or step,layer,expert,tokens               read, written (.csv)
  load-json         nested lists, alone or under load or logical_count             read, written (.json)
  sglang-pt         SGLang's recorder, modes stat, stat_approx, per_pass           read
  trtllm            TensorRT-LLM's folder of expert statistics                     read

Formats of placements: moeyard-placement (.json), sglang-placement, trtllm-placement (.yaml), ascend-placement,
phy2log-npy; all read and written.

Nothing in a file is executed. A file is written under a temporary name and renamed when it is whole.

Examples:
  router-sim convert expert_distribution_recorder_1.pt load.npy --sum   SGLang's record, summed over its steps
  router-sim convert demo-mixtral.moetrace demo.moeroute                to moeyard's own trace
  router-sim convert demo-mixtral.moetrace#novel load.csv --window 4    tokens labelled `novel`, counted
  router-sim convert routed.npy tokens.jsonl --experts 128              vLLM's routed_experts
  router-sim convert placement.json eplb.yaml                           a placement for TensorRT-LLM
  router-sim convert map.npy placement.json --ranks 8                   a placement from vLLM's or DeepSeek's EPLB";

/// What to convert.
#[derive(Args)]
#[command(after_help = FORMATS)]
pub struct Arguments {
    /// File or folder to read; FILE#LABEL,LABEL takes only tokens with one of the labels, `mmlu*` all that begin so
    #[arg(value_name = "INPUT")]
    from: PathBuf,
    /// File to write; its extension says the format unless --output-format does
    #[arg(value_name = "OUTPUT")]
    to: PathBuf,
    /// Write this format
    #[arg(long, value_name = "FORMAT", value_parser = Target::parse)]
    output_format: Option<Target>,
    /// Loads: one window over the whole input
    #[arg(long, conflicts_with = "window")]
    sum: bool,
    /// Loads: so many steps, windows or batches of the input to a window
    #[arg(long, value_name = "STEPS", default_value_t = 1)]
    window: u64,
    /// Tokens per batch, where the input has no steps
    #[arg(long, value_name = "TOKENS")]
    batch_tokens: Option<usize>,
    /// Placements: ranks, where the input does not say
    #[arg(long, value_name = "N")]
    ranks: Option<usize>,
    #[command(flatten)]
    input: InputFlags,
}

pub fn run(arguments: Arguments) -> Result<()> {
    let from_placement = begins_like_placement(&arguments.from);
    let target = match arguments.output_format {
        Some(target) => target,
        None => Target::by_extension(&arguments.to, from_placement || arguments.ranks.is_some())?,
    };
    match target {
        Target::Placement(format) => placement(&arguments, format),
        Target::Record(format) => record(&arguments, format),
    }
}

/// Looks at the beginning of a file; what cannot be read has its say later.
fn begins_like_placement(path: &Path) -> bool {
    use std::io::Read;
    let mut start = Vec::new();
    let is_file = path.is_file();
    let read = std::fs::File::open(path).and_then(|file| match is_file {
        true => file.take(1 << 12).read_to_end(&mut start),
        false => Ok(0),
    });
    read.is_ok() && placements::looks_like(&start)
}

fn placement(arguments: &Arguments, format: PlacementFormat) -> Result<()> {
    let Arguments { from, to, ranks, input, .. } = arguments;
    let missing = Missing { ranks: *ranks, experts: input.experts, first_layer: input.first_layer };
    let placement = placements::read(from, &missing)?;
    placements::write(to, &placement, format)?;
    super::print(&format!(
        "{}: {} layers, {} ranks x {} slots, {} experts\n",
        to.display(),
        placement.layers(),
        placement.ranks(),
        placement.slots_per_rank(),
        placement.experts()
    ))
}

fn record(arguments: &Arguments, format: Format) -> Result<()> {
    let Arguments { from, to, sum, window, batch_tokens, input, .. } = arguments;
    let (path, mut options) = input.options(from);
    options.batch_rows = *batch_tokens;
    let opened = formats::open(&path, &options)?;
    let Written { what, skipped } = write_record(to, format, opened, if *sum { u64::MAX } else { *window })?;
    tell_skipped(from, skipped);
    super::print(&format!("{}: {what}\n", to.display()))
}
