//! Recorded routing in the formats of many tools: one file per format, reader and writer side by side.
//!
//! [`open`] recognises a file by its first bytes and its name and gives a stream of tokens or of loads
//! ([`crate::stream`]); [`open_tokens`], [`open_loads`], [`read_windows`] and [`read_total`] are for callers that need
//! one kind. Nothing in a file is executed or believed: sizes are checked before memory is taken, ids and counts are
//! checked one by one, and an error names the file and the number of the record, counted from 0.

pub mod source;
pub mod number;
pub mod array;
pub mod npy;
mod zip;
mod npz;
pub mod safetensors;
mod trtllm;
pub mod csv;
pub mod json;
mod memory;
mod matrix;
pub mod jsonl;
mod gather;
mod route_lines;
mod parquet;
mod moetrace;
mod trace;
mod pickle;
mod sglang;
mod sniff;
pub mod write;
pub mod placements;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

pub use source::Progress;

use self::array::ArrayReader;
use self::matrix::{MatrixReader, Requests, RoutedReader};
use crate::load::{LoadWindow, Phase};
use crate::stream::rows::{Batches, Row, RowReader};
use crate::stream::windows::{WindowReader, Windows};
use crate::stream::{LoadStream, TokenLoads, TokenStream, collect};
use crate::{Error, Result};

/// Tokens per batch of formats that have no steps.
pub const DEFAULT_BATCH_ROWS: usize = 4096;

/// Largest index of a model's first MoE layer.
const MAX_FIRST_LAYER: usize = 1 << 20;

/// What a file can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// moeyard's routing trace.
    Trace,
    /// The simple trace of the demo models.
    Moetrace,
    /// moeyard's JSON lines of tokens.
    TokensJsonl,
    /// JSON lines per token and layer, or per batch and layer, of logging hooks.
    RouteJsonl,
    /// Lists of expert ids in columns.
    Parquet,
    /// SGLang's expert distribution recorder, `.pt`.
    SglangPt,
    /// `.npy` of loads `[steps?, layers, experts]`.
    LoadNpy,
    /// `.npz` with such an array.
    LoadNpz,
    /// `.safetensors` with such a tensor.
    LoadSafetensors,
    /// Loads as comma-separated values.
    LoadCsv,
    /// Loads as JSON, SGLang's `logical_count` among them.
    LoadJson,
    /// TensorRT-LLM's folder of expert statistics.
    Trtllm,
    /// `.npy` of expert ids `[tokens, layers, top_k]`, vLLM's `routed_experts`.
    RoutedNpy,
    /// `.npz` with such an array, and perhaps `file_id` or `request_id` `[tokens]`.
    RoutedNpz,
}

impl Format {
    /// All of them, token formats first.
    pub const ALL: [Format; 14] = [
        Format::Trace,
        Format::Moetrace,
        Format::TokensJsonl,
        Format::RouteJsonl,
        Format::RoutedNpy,
        Format::RoutedNpz,
        Format::Parquet,
        Format::SglangPt,
        Format::LoadNpy,
        Format::LoadNpz,
        Format::LoadSafetensors,
        Format::LoadCsv,
        Format::LoadJson,
        Format::Trtllm,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Trace => "trace",
            Format::Moetrace => "moetrace",
            Format::TokensJsonl => "tokens-jsonl",
            Format::RouteJsonl => "route-jsonl",
            Format::RoutedNpy => "routed-npy",
            Format::RoutedNpz => "routed-npz",
            Format::Parquet => "parquet",
            Format::SglangPt => "sglang-pt",
            Format::LoadNpy => "load-npy",
            Format::LoadNpz => "load-npz",
            Format::LoadSafetensors => "load-safetensors",
            Format::LoadCsv => "load-csv",
            Format::LoadJson => "load-json",
            Format::Trtllm => "trtllm",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Format::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            let known: Vec<&str> = Format::ALL.iter().map(|format| format.name()).collect();
            format!("format {name:?} is unknown, expected one of {}", known.join(", "))
        })
    }
}

/// How to read a file, and what it does not say itself.
#[derive(Clone, Default)]
pub struct Options {
    /// Read it as this instead of looking.
    pub format: Option<Format>,
    /// Leave unusable records out and count them.
    pub lenient: bool,
    /// Experts per layer. A file that says otherwise is refused; one that does not say is counted, in a first pass.
    pub experts: Option<usize>,
    /// Absolute index of the first MoE layer, for files that do not say; 0 when not given.
    pub first_layer: Option<usize>,
    /// Phase of the tokens, for files that do not say; prefill when not given.
    pub phase: Option<Phase>,
    /// Times which loads are taken, and then rounded: for shares and averages.
    pub scale: Option<f64>,
    /// Tokens per batch of formats that have no steps; [`DEFAULT_BATCH_ROWS`] when not given.
    pub batch_rows: Option<usize>,
    /// Only tokens marked with one of these labels; empty takes all. `mmlu*` stands for all that begin so.
    pub labels: Vec<String>,
    /// Told how far the reading is.
    pub progress: Option<Progress>,
}

impl Options {
    fn phase(&self) -> Phase {
        self.phase.unwrap_or(Phase::Prefill)
    }

    fn layer_ids(&self, layers: usize) -> Vec<usize> {
        let first = self.first_layer.unwrap_or(0);
        (first..first.saturating_add(layers)).collect()
    }

    /// Refuses values beyond any model.
    fn check(&self) -> Result<(), String> {
        if let Some(first) = self.first_layer.filter(|first| *first > MAX_FIRST_LAYER) {
            return Err(format!("first layer {first} exceeds the limit of {MAX_FIRST_LAYER}"));
        }
        if let Some(experts) = self.experts.filter(|experts| !(1..=1 << 16).contains(experts)) {
            return Err(format!("{experts} experts are not within 1..={}", 1 << 16));
        }
        match self.scale {
            Some(scale) if !(scale.is_finite() && scale > 0.0) => {
                Err(format!("scale {scale} is not above 0"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a file that has other experts than expected.
    fn check_experts(&self, found: usize) -> Result<(), String> {
        match self.experts {
            Some(experts) if experts != found => Err(format!("{found} experts, expected {experts}")),
            _ => Ok(()),
        }
    }

    /// The numbers of the wanted labels.
    fn label_ids(&self, known: &[String]) -> Result<Vec<u16>, String> {
        let mut ids = Vec::new();
        for wanted in &self.labels {
            let matches = |label: &String| match wanted.strip_suffix('*') {
                Some(prefix) => label.starts_with(prefix),
                None => label == wanted,
            };
            let before = ids.len();
            ids.extend((0..known.len()).filter(|id| matches(&known[*id])).map(|id| id as u16));
            if known.is_empty() {
                return Err(format!("label {wanted:?} is asked for, but tokens carry no labels"));
            }
            if ids.len() == before {
                return Err(format!("label {wanted:?} is unknown, expected one of {}", known.join(", ")));
            }
        }
        Ok(ids)
    }
}

/// An opened file.
pub enum Input {
    /// Tokens with the experts of each.
    Tokens(Box<dyn TokenStream>),
    /// Counts only.
    Loads(Box<dyn LoadStream>),
}

/// Opens a file of any known format.
///
/// # Errors
/// [`Error::Io`], [`Error::File`] and [`Error::Record`].
pub fn open(path: &Path, options: &Options) -> Result<Input> {
    let refuse = |why| in_file(path, why);
    options.check().map_err(refuse)?;
    let format = match options.format {
        Some(format) => format,
        None => sniff::format(path)?,
    };
    let source = || source::open(path, options.progress.clone());
    match format {
        Format::Trace => {
            options.label_ids(&[]).map_err(refuse)?;
            let steps = trace::TraceSteps::new(path, source()?, options.lenient)?;
            options.check_experts(steps.shape().experts).map_err(refuse)?;
            Ok(Input::Tokens(Box::new(steps)))
        }
        Format::Moetrace => {
            let reader = moetrace::MoetraceReader::new(path, source()?, options);
            rows(reader.map_err(|why| Error::Record { path: path.into(), record: 0, why })?, options)
        }
        Format::TokensJsonl => rows(jsonl::TokenLines::new(path, source()?, options)?, options),
        Format::RouteJsonl => rows(route_lines::open(path, options)?, options),
        Format::RoutedNpy => {
            let array = npy::read(Box::new(source()?)).map_err(refuse)?;
            let again = || npy::read(Box::new(source::open(path, None)?)).map_err(refuse);
            routed(path, array, again, Requests::default(), options)
        }
        Format::RoutedNpz => {
            let requests = npz::requests(path)?;
            routed(path, npz::routed_array(path)?, || npz::routed_array(path), requests, options)
        }
        Format::Parquet => rows(parquet::open(path, options)?, options),
        Format::SglangPt => sglang::open(path, options),
        Format::LoadNpy => matrix(path, npy::read(Box::new(source()?)).map_err(refuse)?, options),
        Format::LoadNpz => matrix(path, npz::load_array(path)?, options),
        Format::LoadSafetensors => {
            matrix(path, safetensors::load_array(path, options.progress.clone())?, options)
        }
        Format::LoadCsv => loads(csv::read(path, options)?, options),
        Format::LoadJson => loads(json::read(path, options)?, options),
        Format::Trtllm => loads(trtllm::Statistics::open(path, options)?, options),
    }
}

/// Opens a file that must hold tokens.
///
/// # Errors
/// As [`open`], and [`Error::File`] when it holds counts only.
pub fn open_tokens(path: &Path, options: &Options) -> Result<Box<dyn TokenStream>> {
    match open(path, options)? {
        Input::Tokens(tokens) => Ok(tokens),
        Input::Loads(_) => {
            Err(in_file(path, "holds loads only; this needs the experts of each token".to_owned()))
        }
    }
}

/// Opens a file of any known format as loads; tokens are counted, a window per batch.
///
/// # Errors
/// As [`open`].
pub fn open_loads(path: &Path, options: &Options) -> Result<Box<dyn LoadStream>> {
    Ok(match open(path, options)? {
        Input::Tokens(tokens) => Box::new(TokenLoads::new(tokens, 1)),
        Input::Loads(loads) => loads,
    })
}

/// The load of a whole file, summed over its steps, and the records left out.
///
/// # Errors
/// As [`open`], and [`Error::File`] when there is nothing in it.
pub fn read_total(path: &Path, options: &Options) -> Result<(LoadWindow, u64)> {
    let (mut windows, skipped) = read_windows(path, options, 1)?;
    Ok((windows.pop().expect("at least one window"), skipped))
}

/// The load of a file as windows in the order of time, at most `most`: neighbours are summed where there are more. Also
/// gives the records left out.
///
/// # Errors
/// As [`open`], and [`Error::File`] when there is no window.
pub fn read_windows(path: &Path, options: &Options, most: usize) -> Result<(Vec<LoadWindow>, u64)> {
    let mut stream = open_loads(path, options)?;
    let windows = collect(&mut stream, most)?;
    match windows.is_empty() {
        true => Err(in_file(path, "no usable record".to_owned())),
        false => Ok((windows, stream.skipped())),
    }
}

fn in_file(path: &Path, why: String) -> Error {
    Error::File { path: path.into(), why }
}

fn matrix(path: &Path, array: ArrayReader, options: &Options) -> Result<Input> {
    loads(MatrixReader::new(path, array, options).map_err(|why| in_file(path, why))?, options)
}

fn loads(reader: impl WindowReader + 'static, options: &Options) -> Result<Input> {
    options.label_ids(&[]).map_err(|why| in_file(reader.path(), why))?;
    windows(reader, options)
}

fn windows(reader: impl WindowReader + 'static, options: &Options) -> Result<Input> {
    Ok(Input::Loads(Box::new(Windows::new(reader, options.lenient))))
}

fn rows(reader: impl RowReader + 'static, options: &Options) -> Result<Input> {
    let labels = options.label_ids(&reader.shape().labels).map_err(|why| in_file(reader.path(), why))?;
    let batch_rows = options.batch_rows.unwrap_or(DEFAULT_BATCH_ROWS);
    Ok(Input::Tokens(Box::new(Batches::new(reader, batch_rows, labels, options.lenient))))
}

/// Routed experts; where nobody says how many experts there are, a first pass looks for the largest id.
fn routed(
    path: &Path,
    array: ArrayReader,
    again: impl Fn() -> Result<ArrayReader>,
    requests: Requests,
    options: &Options,
) -> Result<Input> {
    let refuse = |why| in_file(path, why);
    let experts = match options.experts {
        Some(experts) => experts,
        None => {
            let all = RoutedReader::new(path, again()?, Requests::default(), 1 << 16, options);
            experts_seen(all.map_err(refuse)?)
        }
    };
    rows(RoutedReader::new(path, array, requests, experts, options).map_err(refuse)?, options)
}

/// One more than the largest id. Unusable records have their say when the file is read again.
fn experts_seen(mut reader: impl RowReader) -> usize {
    let (mut row, mut largest) = (Row::default(), 0);
    loop {
        match reader.next_row(&mut row) {
            Ok(true) => largest = row.ids.iter().fold(largest, |largest, id| largest.max(*id)),
            Ok(false) => return (largest.clamp(0, (1 << 16) - 1) + 1) as usize,
            Err(_) => {}
        }
    }
}
