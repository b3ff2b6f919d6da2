//! Pieces of device memory that travel in one group of NCCL's calls.

use std::ffi::{c_int, c_void};

use super::library::{BYTES, Code, IN_PROGRESS, SUCCESS};
use super::link::{Line, Link};
use super::rows::Rows;
use crate::error::Result;

/// Contiguous device memory that another rank gets or fills.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub rank: usize,
    pub address: usize,
    pub bytes: usize,
}

/// What a rank sends and receives in one exchange, noted piece by piece.
pub(super) struct Pieces {
    me: usize,
    /// Pieces that a rank has for itself travel too.
    loopback: bool,
    outgoing: Vec<Piece>,
    incoming: Vec<Piece>,
}

impl Pieces {
    /// None yet, of rank `me`.
    pub fn new(me: usize, loopback: bool) -> Pieces {
        Pieces { me, loopback, outgoing: Vec::new(), incoming: Vec::new() }
    }

    /// Notes the parts of `rows`, `counts` rows each, for the ranks they go to.
    pub fn send_parts(&mut self, rows: Rows, counts: impl Iterator<Item = usize>) {
        let mut start = 0;
        for (r, count) in counts.enumerate() {
            self.send(rows.piece(r, start..start + count));
            start += count;
        }
    }

    /// Notes the parts of `out`, `counts` rows each, for the ranks they come from.
    pub fn receive_parts(&mut self, out: Rows, counts: impl Iterator<Item = usize>) {
        let mut start = 0;
        for (r, count) in counts.enumerate() {
            self.receive(out.piece(r, start..start + count));
            start += count;
        }
    }

    pub fn send(&mut self, piece: Piece) {
        if self.travels(piece) {
            self.outgoing.push(piece);
        }
    }

    pub fn receive(&mut self, piece: Piece) {
        if self.travels(piece) {
            self.incoming.push(piece);
        }
    }

    fn travels(&self, piece: Piece) -> bool {
        piece.bytes > 0 && (piece.rank != self.me || self.loopback)
    }

    pub fn clear(&mut self) {
        self.outgoing.clear();
        self.incoming.clear();
    }

    /// Forgets those of ranks that are not to be met.
    pub fn retain(&mut self, met: impl Fn(usize) -> bool) {
        self.outgoing.retain(|piece| met(piece.rank));
        self.incoming.retain(|piece| met(piece.rank));
    }

    /// Puts the pieces noted into a stream.
    pub fn put(&self, link: &Link, what: &str, line: Line) -> Result<()> {
        if !(self.outgoing.is_empty() && self.incoming.is_empty()) {
            let (outgoing, incoming) = (&self.outgoing, &self.incoming);
            link.call(what, line, |functions, handle, stream| {
                // SAFETY: groups are the calling thread's own.
                let started = unsafe { (functions.group_start)() };
                let sends = outgoing.iter().map(|piece| {
                    let (data, peer) = (piece.address as *const c_void, piece.rank as c_int);
                    // SAFETY: the piece is device memory of that size, kept until the stream has passed; so is the stream.
                    unsafe { (functions.send)(data, piece.bytes, BYTES, peer, handle, stream) }
                });
                let receives = incoming.iter().map(|piece| {
                    let (data, peer) = (piece.address as *mut c_void, piece.rank as c_int);
                    // SAFETY: as above; nobody else touches the memory before the stream has passed.
                    unsafe { (functions.receive)(data, piece.bytes, BYTES, peer, handle, stream) }
                });
                let failed = std::iter::once(started).chain(sends).chain(receives).find(|&code| !good(code));
                // A group that was started is ended, whatever came of its calls.
                // SAFETY: as above.
                let ended = if good(started) { unsafe { (functions.group_end)() } } else { started };
                failed.unwrap_or(ended)
            })?;
        }
        Ok(())
    }
}

fn good(code: Code) -> bool {
    matches!(code, SUCCESS | IN_PROGRESS)
}
