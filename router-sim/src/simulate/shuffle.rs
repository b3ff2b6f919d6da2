//! Tokens in random order: batches that are independent samples of the recorded traffic, each token with all the experts
//! that it really chose.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::draw::shuffle;
use crate::Result;
use crate::stream::{TokenBatch, TokenRow, TokenShape, TokenStream};

/// Tokens that are shuffled at a time: a longer recording is shuffled piece by piece.
const PIECE_ROWS: usize = 1 << 18;

/// A recording, shuffled.
#[derive(Debug)]
pub struct Shuffled<S> {
    tokens: S,
    rows: usize,
    steps: u64,
    rng: ChaCha8Rng,
    read: TokenBatch,
    piece: Vec<TokenRow>,
    /// `[piece][layers][top_k]`
    ids: Vec<u16>,
    order: Vec<u32>,
    at: usize,
}

impl<S: TokenStream> Shuffled<S> {
    /// Batches of `rows` tokens. The same seed gives the same order.
    pub fn new(tokens: S, rows: usize, seed: u64) -> Self {
        Shuffled {
            tokens,
            rows: rows.max(1),
            steps: 0,
            rng: ChaCha8Rng::seed_from_u64(seed),
            read: TokenBatch::default(),
            piece: Vec::new(),
            ids: Vec::new(),
            order: Vec::new(),
            at: 0,
        }
    }

    /// Reads and shuffles the next piece; false at the end of the recording.
    fn next_piece(&mut self) -> Result<bool> {
        let (layers, top_k) = (self.tokens.shape().layers(), self.tokens.shape().top_k);
        self.piece.clear();
        self.ids.clear();
        self.at = 0;
        while self.piece.len() < PIECE_ROWS && self.tokens.next_batch(&mut self.read)? {
            self.piece.extend_from_slice(&self.read.rows);
            for row in 0..self.read.rows.len() {
                for layer in 0..layers {
                    let ids = self.read.layer(layer, layers);
                    self.ids.extend_from_slice(&ids[row * top_k..(row + 1) * top_k]);
                }
            }
        }
        self.order.clear();
        self.order.extend(0..self.piece.len() as u32);
        shuffle(&mut self.order, &mut self.rng);
        Ok(!self.piece.is_empty())
    }
}

impl<S: TokenStream> TokenStream for Shuffled<S> {
    fn shape(&self) -> &TokenShape {
        self.tokens.shape()
    }

    fn next_batch(&mut self, batch: &mut TokenBatch) -> Result<bool> {
        batch.clear();
        if self.at == self.order.len() && !self.next_piece()? {
            return Ok(false);
        }
        let (layers, top_k) = (self.shape().layers(), self.shape().top_k);
        let order = &self.order[self.at..self.order.len().min(self.at + self.rows)];
        batch.rows.extend(order.iter().map(|&row| self.piece[row as usize]));
        for layer in 0..layers {
            for &row in order {
                let start = (row as usize * layers + layer) * top_k;
                batch.ids.extend_from_slice(&self.ids[start..start + top_k]);
            }
        }
        self.at += order.len();
        batch.step = self.steps;
        self.steps += 1;
        Ok(true)
    }

    fn skipped(&self) -> u64 {
        self.tokens.skipped()
    }
}
