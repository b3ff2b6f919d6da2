//! Tokens as JSON lines, the form that any script can write and read: a line about all, then a line per token.
//!
//! ```json
//! {"format": "moeyard-tokens", "version": 1, "layer_ids": [1, 2], "experts": 8, "top_k": 2}
//! {"request": 0, "position": 0, "phase": "prefill", "experts": [[3, 1], [0, 7]]}
//! ```
//! The first line may also have `model`, `ranks`, `labels` and `weights` (true when tokens carry router weights); a
//! token may have `recomputed`, `rank`, `label` (a number) and `weights`, nested as `experts` are.

use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::matrix::check_shape;
use super::source::{Output, Source};
use super::{Options, in_file};
use crate::load::Phase;
use crate::stream::rows::{Row, RowReader};
use crate::stream::{TokenBatch, TokenRow, TokenShape, TokenStream};
use crate::trace::RowInfo;
use crate::{Error, Result};

/// Longest line that is read.
const MAX_LINE_BYTES: u64 = 64 << 20;
/// What the first line must call the file.
const FORMAT: &str = "moeyard-tokens";

/// Lines of a file, with their numbers.
#[derive(Debug)]
pub struct Lines {
    source: Source,
    line: Vec<u8>,
    /// Lines read so far.
    read: u64,
    over: bool,
}

impl Lines {
    /// From the beginning of a file.
    pub fn new(source: Source) -> Self {
        Lines { source, line: Vec::new(), read: 0, over: false }
    }

    /// The next line that is not blank; `None` at the end.
    ///
    /// # Errors
    /// A line that is too long, or what the file says; nothing more is read then.
    pub fn next_line(&mut self) -> Result<Option<&[u8]>, String> {
        loop {
            if self.over {
                return Ok(None);
            }
            self.line.clear();
            let mut limited = io::Read::take(&mut self.source, MAX_LINE_BYTES);
            let n = limited.read_until(b'\n', &mut self.line);
            let n = n.inspect_err(|_| self.over = true).map_err(|e| e.to_string())?;
            if n == 0 {
                self.over = true;
                return Ok(None);
            }
            self.read += 1;
            if n as u64 == MAX_LINE_BYTES && !self.line.ends_with(b"\n") {
                self.over = true;
                return Err(format!("line {}: longer than the limit of {MAX_LINE_BYTES} bytes", self.read));
            }
            if self.line.iter().any(|byte| !byte.is_ascii_whitespace()) {
                return Ok(Some(&self.line));
            }
        }
    }

    /// Record number of the line read last: lines are counted from 0.
    pub fn record(&self) -> u64 {
        self.read.saturating_sub(1)
    }

    /// Parses the line read last.
    pub fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, String> {
        serde_json::from_slice(&self.line).map_err(|e| format!("line {}: {e}", self.read))
    }
}

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    format: String,
    version: u32,
    #[serde(default)]
    model: String,
    layer_ids: Vec<usize>,
    experts: usize,
    top_k: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ranks: Option<usize>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    labels: Vec<String>,
    #[serde(default)]
    weights: bool,
}

/// The line of a token.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenLine {
    request: u64,
    position: u64,
    phase: PhaseName,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    recomputed: bool,
    #[serde(default)]
    rank: u32,
    #[serde(default)]
    label: u16,
    experts: Vec<Vec<i64>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    weights: Vec<Vec<f32>>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum PhaseName {
    Prefill,
    Decode,
}

/// Whether a file begins like one.
pub fn looks_like(start: &[u8]) -> bool {
    let line = start.split(|byte| *byte == b'\n').next().unwrap_or(start);
    line.trim_ascii_start().starts_with(b"{")
        && line.windows(FORMAT.len()).any(|part| part == FORMAT.as_bytes())
}

/// Tokens of a file.
#[derive(Debug)]
pub struct TokenLines {
    path: PathBuf,
    lines: Lines,
    shape: TokenShape,
}

impl TokenLines {
    /// Reads the first line.
    ///
    /// # Errors
    /// [`Error::Record`] for record 0.
    pub fn new(path: &Path, source: Source, options: &Options) -> Result<Self> {
        let mut lines = Lines::new(source);
        let shape = head(&mut lines, options);
        let shape = shape.map_err(|why| Error::Record { path: path.into(), record: 0, why })?;
        Ok(TokenLines { path: path.into(), lines, shape })
    }
}

fn head(lines: &mut Lines, options: &Options) -> Result<TokenShape, String> {
    lines.next_line()?.ok_or("the file is empty")?;
    let head: Head = lines.parse()?;
    if (head.format.as_str(), head.version) != (FORMAT, 1) {
        return Err(format!("format {:?} version {}, expected {FORMAT} 1", head.format, head.version));
    }
    check_shape(head.layer_ids.len(), head.experts)?;
    options.check_experts(head.experts)?;
    if head.top_k == 0 || head.top_k > head.experts {
        return Err(format!("top_k {} is not within 1..={} experts", head.top_k, head.experts));
    }
    if let Some(pair) = head.layer_ids.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(format!("layer ids must ascend, but {} follows {}", pair[1], pair[0]));
    }
    if head.ranks == Some(0) || head.ranks.is_some_and(|ranks| ranks > 1 << 16) {
        return Err(format!("ranks {:?} are not within 1..={}", head.ranks, 1 << 16));
    }
    Ok(TokenShape {
        model: head.model,
        layer_ids: head.layer_ids,
        experts: head.experts,
        top_k: head.top_k,
        ranks: head.ranks,
        labels: head.labels,
        weights: head.weights,
    })
}

impl RowReader for TokenLines {
    fn shape(&self) -> &TokenShape {
        &self.shape
    }

    fn next_row(&mut self, row: &mut Row) -> Result<bool, String> {
        if self.lines.next_line()?.is_none() {
            return Ok(false);
        }
        let line: TokenLine = self.lines.parse()?;
        let top_k = self.shape.top_k;
        if let Some(layer) = line.experts.iter().position(|ids| ids.len() != top_k) {
            return Err(format!("{} experts in list {layer}, expected {top_k}", line.experts[layer].len()));
        }
        if line.rank as usize >= self.shape.ranks.unwrap_or(1) {
            return Err(format!("rank {} of {}", line.rank, self.shape.ranks.unwrap_or(1)));
        }
        if usize::from(line.label) >= self.shape.labels.len().max(1) {
            return Err(format!("label {} of {}", line.label, self.shape.labels.len()));
        }
        let phase = match line.phase {
            PhaseName::Prefill => Phase::Prefill,
            PhaseName::Decode => Phase::Decode,
        };
        let TokenLine { request, position, recomputed, .. } = line;
        let info = RowInfo { request, position, phase, recomputed };
        row.token = Some(TokenRow { info, rank: line.rank, label: line.label });
        row.ids = line.experts.concat();
        row.weights = line.weights.concat();
        Ok(true)
    }

    fn record(&self) -> u64 {
        self.lines.record()
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

/// Writes tokens; nothing is lost but the borders of steps.
///
/// # Errors
/// Those of the stream, [`Error::Io`].
pub fn write(path: &Path, tokens: &mut dyn TokenStream) -> Result<u64> {
    let mut output = Output::create(path)?;
    let shape = tokens.shape().clone();
    let head = Head {
        format: FORMAT.to_owned(),
        version: 1,
        model: shape.model.clone(),
        layer_ids: shape.layer_ids.clone(),
        experts: shape.experts,
        top_k: shape.top_k,
        ranks: shape.ranks,
        labels: shape.labels.clone(),
        weights: shape.weights,
    };
    put(&mut output, &head)?;
    let (mut batch, mut rows) = (TokenBatch::default(), 0);
    while tokens.next_batch(&mut batch)? {
        for (index, row) in batch.rows.iter().enumerate() {
            let info = row.info;
            let line = TokenLine {
                request: info.request,
                position: info.position,
                phase: if info.phase == Phase::Decode { PhaseName::Decode } else { PhaseName::Prefill },
                recomputed: info.recomputed,
                rank: row.rank,
                label: row.label,
                experts: nested(&batch.ids, &shape, index, i64::from),
                weights: nested(&batch.weights, &shape, index, |weight| weight),
            };
            put(&mut output, &line)?;
        }
        rows += batch.rows.len() as u64;
    }
    output.finish_with(rows)
}

fn put(output: &mut Output, line: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec(line).map_err(|e| in_file(output.path(), e.to_string()))?;
    text.push(b'\n');
    output.write_all(&text).map_err(|e| output.error(e))
}

/// One token's part of `[layers][rows][top_k]`, a list per layer.
fn nested<T: Copy, U>(values: &[T], shape: &TokenShape, row: usize, convert: impl Fn(T) -> U) -> Vec<Vec<U>> {
    if values.is_empty() {
        return Vec::new();
    }
    let per_layer = values.len() / shape.layers();
    let of_layer =
        |layer: &[T]| layer[row * shape.top_k..][..shape.top_k].iter().map(|v| convert(*v)).collect();
    values.chunks_exact(per_layer).map(of_layer).collect()
}
