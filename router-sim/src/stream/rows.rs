//! From formats that hold one token after another to batches.

use super::tokens::{TokenBatch, TokenRow, TokenShape, TokenStream};
use crate::{Error, Result};

/// One token as a reader found it.
#[derive(Debug, Clone, Default)]
pub struct Row {
    /// Who and where.
    pub token: Option<TokenRow>,
    /// `[layers][top_k]` expert ids, not checked yet.
    pub ids: Vec<i64>,
    /// Router weights, same shape; empty when there are none.
    pub weights: Vec<f32>,
}

/// A reader of one token after another.
pub trait RowReader {
    /// What all rows share.
    fn shape(&self) -> &TokenShape;

    /// Replaces `row` by the next; false at the end.
    ///
    /// # Errors
    /// What is wrong with the record, without its number. The next call goes on behind it, or says that nothing more
    /// can be read.
    fn next_row(&mut self, row: &mut Row) -> Result<bool, String>;

    /// Number of the record that the last call looked at.
    fn record(&self) -> u64;

    /// Names the file for messages.
    fn path(&self) -> &std::path::Path;
}

/// Rows of a reader, checked and gathered to batches.
#[derive(Debug)]
pub struct Batches<R> {
    reader: R,
    /// Rows per batch, at least 1.
    batch_rows: usize,
    /// Only rows with one of these labels; empty takes all.
    labels: Vec<u16>,
    lenient: bool,
    skipped: u64,
    batches: u64,
    row: Row,
    /// Rows of the batch under way with their ids `[rows][layers][top_k]`: it survives an error in the midst of it.
    tokens: Vec<TokenRow>,
    ids: Vec<u16>,
    weights: Vec<f32>,
}

impl<R: RowReader> Batches<R> {
    pub fn new(reader: R, batch_rows: usize, labels: Vec<u16>, lenient: bool) -> Self {
        Batches {
            reader,
            batch_rows: batch_rows.max(1),
            labels,
            lenient,
            skipped: 0,
            batches: 0,
            row: Row::default(),
            tokens: Vec::new(),
            ids: Vec::new(),
            weights: Vec::new(),
        }
    }

    /// Takes rows until the batch is full; false when no more come.
    fn gather(&mut self) -> Result<bool> {
        while self.tokens.len() < self.batch_rows {
            let more = self.reader.next_row(&mut self.row);
            let taken = more.and_then(|more| match more {
                true => self.take_row().map(|()| true),
                false => Ok(false),
            });
            match taken {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(_) if self.lenient => self.skipped += 1,
                Err(why) => {
                    let (path, record) = (self.reader.path().into(), self.reader.record());
                    return Err(Error::Record { path, record, why });
                }
            }
        }
        Ok(true)
    }

    /// Checks the row at hand and adds it to the batch under way.
    fn take_row(&mut self) -> Result<(), String> {
        let shape = self.reader.shape();
        let token = self.row.token.ok_or("no token")?;
        if !self.labels.is_empty() && !self.labels.contains(&token.label) {
            return Ok(());
        }
        let due = shape.ids_per_row();
        if self.row.ids.len() != due {
            return Err(format!("{} expert ids, expected {due}", self.row.ids.len()));
        }
        let experts = shape.experts as i64;
        if let Some(at) = self.row.ids.iter().position(|id| !(0..experts).contains(id)) {
            let (layer, id) = (shape.layer_ids[at / shape.top_k], self.row.ids[at]);
            return Err(format!("layer {layer}: expert {id} is not within 0..{experts}"));
        }
        if shape.weights {
            if self.row.weights.len() != due {
                return Err(format!("{} router weights, expected {due}", self.row.weights.len()));
            }
            if let Some(weight) = self.row.weights.iter().find(|w| !w.is_finite()) {
                return Err(format!("router weight {weight} is not finite"));
            }
            self.weights.extend_from_slice(&self.row.weights);
        }
        self.ids.extend(self.row.ids.iter().map(|id| *id as u16));
        self.tokens.push(token);
        Ok(())
    }
}

impl<R: RowReader> TokenStream for Batches<R> {
    fn shape(&self) -> &TokenShape {
        self.reader.shape()
    }

    fn next_batch(&mut self, batch: &mut TokenBatch) -> Result<bool> {
        batch.clear();
        self.gather()?;
        if self.tokens.is_empty() {
            return Ok(false);
        }
        batch.step = self.batches;
        self.batches += 1;
        std::mem::swap(&mut batch.rows, &mut self.tokens);
        let (layers, top_k) = (self.reader.shape().layers(), self.reader.shape().top_k);
        layers_first(&self.ids, layers, top_k, &mut batch.ids);
        layers_first(&self.weights, layers, top_k, &mut batch.weights);
        self.ids.clear();
        self.weights.clear();
        Ok(true)
    }

    fn skipped(&self) -> u64 {
        self.skipped
    }
}

/// `[rows][layers][top_k]` to `[layers][rows][top_k]`.
pub fn layers_first<T: Copy>(from: &[T], layers: usize, top_k: usize, to: &mut Vec<T>) {
    to.clear();
    to.reserve(from.len());
    for layer in 0..layers {
        from.chunks_exact(layers * top_k)
            .for_each(|row| to.extend_from_slice(&row[layer * top_k..(layer + 1) * top_k]));
    }
}
