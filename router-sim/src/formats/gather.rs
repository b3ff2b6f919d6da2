//! Puts tokens together whose layers lie apart: records of one layer each, in any order.
//!
//! A first pass over the file looks for the layers, the experts and the choices per token; the second gathers. What
//! lacks layers is held, up to a limit, so that a file that goes through a batch layer by layer works as well as one
//! that goes token by token.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::{Path, PathBuf};

use super::matrix::check_shape;
use super::{Options, in_file};
use crate::Result;
use crate::load::Phase;
use crate::stream::rows::{Row, RowReader};
use crate::stream::{TokenRow, TokenShape};
use crate::trace::RowInfo;

/// Tokens that may lack layers at a time.
const MAX_OPEN_TOKENS: usize = 1 << 16;
/// Layer indices are below this.
pub const MAX_LAYERS: usize = 1 << 16;

/// Request ids are numbers or texts.
#[derive(Debug, PartialEq, Eq, Hash)]
pub enum Name {
    /// A number.
    Number(u64),
    /// Anything else.
    Text(String),
}

/// What one record says: the choices of consecutive tokens of a request in one layer.
#[derive(Debug)]
pub struct Piece {
    /// The request.
    pub request: Name,
    /// Position of the first token.
    pub first_token: u64,
    /// The layer, below [`MAX_LAYERS`].
    pub layer: usize,
    /// `[tokens][top_k]`
    pub ids: Vec<Vec<i64>>,
    /// Router weights of the only token; empty when there are none.
    pub weights: Vec<f32>,
}

/// A reader of such records.
pub trait PieceReader {
    /// The next one; `None` at the end.
    ///
    /// # Errors
    /// What is wrong with the record. The next call goes on behind it, or says that nothing more can be read.
    fn next_piece(&mut self) -> Result<Option<Piece>, String>;

    /// Number of the record read last.
    fn record(&self) -> u64;
}

/// A token that lacks layers.
struct Open {
    /// `[layers][top_k]`
    ids: Vec<u16>,
    weights: Vec<f32>,
    /// Layers that are there.
    layers: Vec<bool>,
}

/// Tokens of a file, in the order in which their last records come.
pub struct Gathered<P> {
    path: PathBuf,
    pieces: P,
    shape: TokenShape,
    phase: Phase,
    requests: HashMap<String, u64>,
    open: HashMap<(u64, u64), Open>,
    /// Tokens that are whole.
    done: VecDeque<((u64, u64), Open)>,
    /// Tokens that never became whole, once the file is over.
    incomplete: Option<Vec<(u64, u64)>>,
}

impl<P: PieceReader> Gathered<P> {
    /// Looks through the file with one reader, to read it again with another.
    ///
    /// # Errors
    /// [`crate::Error::File`]. Records that are wrong have their say when they are read again.
    pub fn new(path: &Path, mut first_pass: P, pieces: P, options: &Options) -> Result<Self> {
        let (mut layers, mut largest, mut top_k, mut weights) = (BTreeSet::new(), 0, 0, true);
        loop {
            match first_pass.next_piece() {
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
        let refuse = |why: String| in_file(path, why);
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
        Ok(Gathered {
            path: path.into(),
            pieces,
            shape,
            phase: options.phase(),
            requests: HashMap::new(),
            open: HashMap::new(),
            done: VecDeque::new(),
            incomplete: None,
        })
    }

    /// Enters one record.
    fn take(&mut self, piece: Piece) -> Result<(), String> {
        let (layers, top_k, experts) = (self.shape.layers(), self.shape.top_k, self.shape.experts as i64);
        let layer = self.shape.layer_ids.binary_search(&piece.layer);
        let layer =
            layer.map_err(|_| format!("layer {} is new: the file has changed meanwhile", piece.layer))?;
        let known = self.requests.len() as u64;
        let request = match piece.request {
            Name::Number(number) => number,
            Name::Text(text) => *self.requests.entry(text).or_insert(known),
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

impl<P: PieceReader> RowReader for Gathered<P> {
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
                match self.pieces.next_piece()? {
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
        self.pieces.record()
    }

    fn path(&self) -> &Path {
        &self.path
    }
}
