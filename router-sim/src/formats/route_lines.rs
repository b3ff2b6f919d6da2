//! Tokens as JSON lines per layer, as logging hooks of other engines write them, in two forms:
//!
//! ```json
//! {"type": "route", "req_id": "a", "token_idx": 0, "layer": 3, "topk_ids": [5, 9], "topk_weights": [0.7, 0.3]}
//! {"layer": 0, "batch_id": 4, "topk_experts": [[5, 9], [1, 2]]}
//! ```
//! The second has a list per token of a batch. Lines of type `meta` and keys that are not named here are passed over.

use std::path::Path;

use serde::Deserialize;

use super::gather::{Gathered, MAX_LAYERS, Name, Piece, PieceReader};
use super::jsonl::Lines;
use super::{Options, source};
use crate::Result;

/// Whether a file begins like one.
pub fn looks_like(start: &[u8]) -> bool {
    let line = start.split(|byte| *byte == b'\n').next().unwrap_or(start);
    let has = |word: &[u8]| line.windows(word.len()).any(|part| part == word);
    line.trim_ascii_start().starts_with(b"{")
        && line.trim_ascii_end().ends_with(b"}")
        && (has(b"\"route\"") || has(b"\"meta\"") || has(b"\"topk_experts\"") || has(b"\"topk_ids\""))
}

#[derive(Deserialize)]
struct Fields {
    #[serde(rename = "type")]
    kind: Option<String>,
    req_id: Option<RequestId>,
    token_idx: Option<u64>,
    layer: Option<usize>,
    #[serde(default)]
    topk_ids: Vec<i64>,
    #[serde(default)]
    topk_weights: Vec<f32>,
    batch_id: Option<u64>,
    #[serde(default)]
    topk_experts: Vec<Vec<i64>>,
}

/// Request ids are numbers or texts.
#[derive(Deserialize)]
#[serde(untagged)]
enum RequestId {
    Number(u64),
    Text(String),
}

/// Lines of a file, in either form.
pub struct RouteLines(Lines);

impl PieceReader for RouteLines {
    fn next_piece(&mut self) -> Result<Option<Piece>, String> {
        let lines = &mut self.0;
        while lines.next_line()?.is_some() {
            let fields: Fields = lines.parse()?;
            if fields.kind.as_deref() == Some("meta") {
                continue;
            }
            let missing = |key: &str| format!("line {}: no {key}", lines.record() + 1);
            let layer = fields.layer.ok_or_else(|| missing("layer"))?;
            if layer >= MAX_LAYERS {
                return Err(format!(
                    "line {}: layer {layer} is not below {}",
                    lines.record() + 1,
                    MAX_LAYERS
                ));
            }
            let piece = match (fields.batch_id, fields.req_id) {
                (Some(batch), None) => Piece {
                    request: Name::Number(batch),
                    first_token: 0,
                    layer,
                    ids: fields.topk_experts,
                    weights: Vec::new(),
                },
                (_, Some(request)) => Piece {
                    request: match request {
                        RequestId::Number(number) => Name::Number(number),
                        RequestId::Text(text) => Name::Text(text),
                    },
                    first_token: fields.token_idx.ok_or_else(|| missing("token_idx"))?,
                    layer,
                    ids: vec![fields.topk_ids],
                    weights: fields.topk_weights,
                },
                (None, None) => return Err(missing("req_id or batch_id")),
            };
            return Ok(Some(piece));
        }
        Ok(None)
    }

    fn record(&self) -> u64 {
        self.0.record()
    }
}

/// Opens a file.
///
/// # Errors
/// [`crate::Error::Io`], [`crate::Error::File`].
pub fn open(path: &Path, options: &Options) -> Result<Gathered<RouteLines>> {
    let first_pass = RouteLines(Lines::new(source::open(path, options.progress.clone())?));
    let lines = RouteLines(Lines::new(source::open(path, None)?));
    Gathered::new(path, first_pass, lines, options)
}
