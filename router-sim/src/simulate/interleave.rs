//! Requests side by side: what a serving engine makes of tokens that were recorded one request after another.

use std::collections::VecDeque;

use crate::Result;
use crate::stream::{TokenBatch, TokenRow, TokenShape, TokenStream};

/// Tokens of a request that are held at most; a longer one counts as several.
const MOST_ROWS: usize = 4096;

/// Batches with tokens of many requests. So many requests are under way at a time, and each gives equally many tokens to
/// a batch: one in decode. When one ends, the next of the recording takes its place.
///
/// A request is a run of rows with the same request id. Holds the requests under way, however long the recording is.
#[derive(Debug)]
pub struct Interleaved<S> {
    tokens: S,
    requests: usize,
    rows: usize,
    steps: u64,
    /// The requests under way, in the order in which they began.
    open: VecDeque<Request>,
    /// What was read and belongs to no request yet, from row `at` on.
    read: TokenBatch,
    at: usize,
    over: bool,
}

/// The rest of a request.
#[derive(Debug, Default)]
struct Request {
    rows: Vec<TokenRow>,
    /// `[rows][layers][top_k]`
    ids: Vec<u16>,
    at: usize,
}

impl<S: TokenStream> Interleaved<S> {
    /// Batches of `rows` tokens from `requests` requests at a time; both at least 1.
    pub fn new(tokens: S, requests: usize, rows: usize) -> Self {
        Interleaved {
            tokens,
            requests: requests.max(1),
            rows: rows.max(1),
            steps: 0,
            open: VecDeque::new(),
            read: TokenBatch::default(),
            at: 0,
            over: false,
        }
    }

    /// Collects the next request; `None` at the end of the recording.
    fn next_request(&mut self) -> Result<Option<Request>> {
        let mut request = Request::default();
        let (layers, top_k) = (self.tokens.shape().layers(), self.tokens.shape().top_k);
        loop {
            if self.at == self.read.rows.len() {
                self.over = self.over || !self.tokens.next_batch(&mut self.read)?;
                self.at = 0;
                if self.over {
                    self.read.clear();
                    return Ok((!request.rows.is_empty()).then_some(request));
                }
            }
            let row = self.read.rows[self.at];
            let another = request.rows.first().is_some_and(|first| first.info.request != row.info.request);
            if another || request.rows.len() == MOST_ROWS {
                return Ok(Some(request));
            }
            request.rows.push(row);
            for layer in 0..layers {
                let ids = self.read.layer(layer, layers);
                request.ids.extend_from_slice(&ids[self.at * top_k..(self.at + 1) * top_k]);
            }
            self.at += 1;
        }
    }
}

impl<S: TokenStream> TokenStream for Interleaved<S> {
    fn shape(&self) -> &TokenShape {
        self.tokens.shape()
    }

    fn next_batch(&mut self, batch: &mut TokenBatch) -> Result<bool> {
        batch.clear();
        while self.open.len() < self.requests {
            match self.next_request()? {
                Some(request) => self.open.push_back(request),
                None => break,
            }
        }
        let (layers, top_k) = (self.shape().layers(), self.shape().top_k);
        let each = self.rows.div_ceil(self.requests);
        // Where each request's rows of this batch begin, and how many they are.
        let mut taken = Vec::with_capacity(self.open.len());
        for request in &self.open {
            let rows = each.min(request.rows.len() - request.at).min(self.rows - batch.rows.len());
            batch.rows.extend_from_slice(&request.rows[request.at..request.at + rows]);
            taken.push(rows);
        }
        for layer in 0..layers {
            for (request, &rows) in self.open.iter().zip(&taken) {
                for row in request.at..request.at + rows {
                    let start = (row * layers + layer) * top_k;
                    batch.ids.extend_from_slice(&request.ids[start..start + top_k]);
                }
            }
        }
        for (request, rows) in self.open.iter_mut().zip(taken) {
            request.at += rows;
        }
        self.open.retain(|request| request.at < request.rows.len());
        batch.step = self.steps;
        self.steps += 1;
        Ok(!batch.rows.is_empty())
    }

    fn skipped(&self) -> u64 {
        self.tokens.skipped()
    }
}
