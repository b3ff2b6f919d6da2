//! Tokens as JSON lines per layer, as logging hooks of other engines write them, in two forms:
//!
//! ```json
//! {"type": "route", "req_id": "a", "token_idx": 0, "layer": 3, "topk_ids": [5, 9], "topk_weights": [0.7, 0.3]}
//! {"layer": 0, "batch_id": 4, "topk_experts": [[5, 9], [1, 2]]}
//! ```
//! The second has a list per token of a batch. Lines of type `meta` and keys that are not named here are passed over.
//! Lines of a token may be far apart: a first pass looks for the layers, and the second puts tokens together.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::Options;
use super::jsonl::Lines;
use super::matrix::check_shape;
use super::source;
use crate::load::Phase;
use crate::stream::rows::{Row, RowReader};
use crate::stream::{TokenRow, TokenShape};
use crate::trace::RowInfo;
use crate::{Error, Result};

/// Tokens that may lack layers at a time.
const MAX_OPEN_TOKENS: usize = 1 << 16;

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
    req_id: Option<Name>,
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
#[derive(Deserialize, PartialEq, Eq, Hash)]
#[serde(untagged)]
enum Name {
    Number(u64),
    Text(String),
}

/// One line, in either form.
struct Piece {
    request: Name,
    first_token: u64,
    layer: usize,
    /// Choices of consecutive tokens.
    ids: Vec<Vec<i64>>,
    weights: Vec<f32>,
}

/// A token that lacks layers.
struct Open {
    /// `[layers][top_k]`
    ids: Vec<u16>,
    weights: Vec<f32>,
    /// Layers that are there.
    layers: Vec<bool>,
}

/// Tokens of a file, in the order in which their last lines come.
pub struct RouteLines {
    path: PathBuf,
    lines: Lines,
    shape: TokenShape,
    phase: Phase,
    requests: HashMap<Name, u64>,
    open: HashMap<(u64, u64), Open>,
    /// Tokens that are whole.
    done: VecDeque<((u64, u64), Open)>,
    /// Tokens that never became whole, once the file is over.
    incomplete: Option<Vec<(u64, u64)>>,
}

/// The next line that says something; `None` at the end.
fn next_piece(lines: &mut Lines) -> Result<Option<Piece>, String> {
    while lines.next_line()?.is_some() {
        let fields: Fields = lines.parse()?;
        if fields.kind.as_deref() == Some("meta") {
            continue;
        }
        let missing = |key: &str| format!("line {}: no {key}", lines.record() + 1);
        let layer = fields.layer.ok_or_else(|| missing("layer"))?;
        if layer >= 1 << 16 {
            return Err(format!("line {}: layer {layer} is not below {}", lines.record() + 1, 1 << 16));
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
                request,
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

impl RouteLines {
    /// Looks through the file for layers and experts.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`]. Lines that are wrong have their say when they are read again.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        let mut lines = Lines::new(source::open(path, options.progress.clone())?);
        let (mut layers, mut largest, mut top_k, mut weights) = (BTreeSet::new(), 0, 0, true);
        loop {
            match next_piece(&mut lines) {
                Ok(Some(piece)) => {
                    layers.insert(piece.layer);
                    largest = piece.ids.iter().flatten().fold(largest, |largest, id| largest.max(*id));
                    top_k = piece.ids.first().map_or(top_k, |ids| top_k.max(ids.len()));
                    weights &= !piece.weights.is_empty();
                }
                Ok(None) => break,
                Err(_) => {}
            }
        }
        let refuse = |why: String| Error::File { path: path.into(), why };
        let experts = options.experts.unwrap_or((largest.clamp(0, (1 << 16) - 1) + 1) as usize);
        check_shape(layers.len(), experts).map_err(refuse)?;
        if top_k == 0 || top_k > experts {
            return Err(refuse(format!("top_k {top_k} is not within 1..={experts} experts")));
        }
        let shape = TokenShape {
            layer_ids: layers.into_iter().collect(),
            experts,
            top_k,
            weights,
            ..TokenShape::default()
        };
        Ok(RouteLines {
            path: path.into(),
            lines: Lines::new(source::open(path, None)?),
            shape,
            phase: options.phase(),
            requests: HashMap::new(),
            open: HashMap::new(),
            done: VecDeque::new(),
            incomplete: None,
        })
    }

    /// Enters one line.
    fn take(&mut self, piece: Piece) -> Result<(), String> {
        let (layers, top_k, experts) = (self.shape.layers(), self.shape.top_k, self.shape.experts as i64);
        let layer = self.shape.layer_ids.binary_search(&piece.layer).expect("the first pass saw all layers");
        let known = self.requests.len() as u64;
        let request = match piece.request {
            Name::Number(number) => number,
            text => *self.requests.entry(text).or_insert(known),
        };
        for (token, ids) in (piece.first_token..).zip(&piece.ids) {
            let key = (request, token);
            if ids.len() != top_k {
                return Err(format!("{} experts, expected {top_k}", ids.len()));
            }
            if let Some(id) = ids.iter().find(|id| !(0..experts).contains(*id)) {
                return Err(format!("expert {id} is not within 0..{experts}"));
            }
            if self.shape.weights && piece.weights.len() != top_k {
                return Err(format!("{} router weights, expected {top_k}", piece.weights.len()));
            }
            if self.open.len() == MAX_OPEN_TOKENS && !self.open.contains_key(&key) {
                return Err(format!("more than the limit of {MAX_OPEN_TOKENS} tokens lack layers"));
            }
            let open = self.open.entry(key).or_insert_with(|| Open {
                ids: vec![0; layers * top_k],
                weights: if self.shape.weights { vec![0.0; layers * top_k] } else { Vec::new() },
                layers: vec![false; layers],
            });
            if std::mem::replace(&mut open.layers[layer], true) {
                return Err(format!("request {request}, token {token} has layer {} twice", piece.layer));
            }
            let place = layer * top_k..(layer + 1) * top_k;
            open.ids[place.clone()].iter_mut().zip(ids).for_each(|(to, id)| *to = *id as u16);
            if self.shape.weights {
                open.weights[place].copy_from_slice(&piece.weights);
            }
            if open.layers.iter().all(|there| *there) {
                let whole = self.open.remove(&key).expect("just entered");
                self.done.push_back((key, whole));
            }
        }
        Ok(())
    }
}

impl RowReader for RouteLines {
    fn shape(&self) -> &TokenShape {
        &self.shape
    }

    fn next_row(&mut self, row: &mut Row) -> Result<bool, String> {
        loop {
            if let Some(((request, position), whole)) = self.done.pop_front() {
                row.ids = whole.ids.into_iter().map(i64::from).collect();
                row.weights = whole.weights;
                let info = RowInfo { request, position, phase: self.phase, recomputed: false };
                row.token = Some(TokenRow { info, rank: 0, label: 0 });
                return Ok(true);
            }
            if self.incomplete.is_none() {
                match next_piece(&mut self.lines)? {
                    Some(piece) => self.take(piece)?,
                    None => {
                        let mut rest: Vec<_> = self.open.keys().copied().collect();
                        rest.sort_unstable_by(|a, b| b.cmp(a));
                        self.incomplete = Some(rest);
                    }
                }
                continue;
            }
            let Some(key) = self.incomplete.as_mut().and_then(Vec::pop) else { return Ok(false) };
            let missing = self.open[&key].layers.iter().position(|there| !there).expect("it was never whole");
            let layer = self.shape.layer_ids[missing];
            return Err(format!("request {}, token {} never gets layer {layer}", key.0, key.1));
        }
    }

    fn record(&self) -> u64 {
        self.lines.record()
    }

    fn path(&self) -> &Path {
        &self.path
    }
}
