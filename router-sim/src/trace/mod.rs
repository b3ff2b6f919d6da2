//! Routing trace, version 1: what the router chose for every token of a run, and what the rebalancer did about it.
//!
//! [`TraceWriter`] records beside a serving engine without ever holding it up; [`TraceReader`] iterates over the
//! records of a file or pipe, one at a time, in bounded memory. Hot records are packed binary, rare ones JSON.
//!
//! # The stream
//! ```text
//! trace  = magic "MOEROUTE" (8 bytes), version u16 little-endian, frame*
//! frame  = tag u8, payload length varint, payload, CRC-32 (IEEE, little-endian) of everything before it in the frame
//! varint = LEB128, at most 10 bytes; zigzag(x) = (x << 1) ^ (x >> 63) makes small negative numbers short
//! ```
//! Frames are the records; they are counted from 0. Record 0 is the header. A reader skips tags that it does not know
//! and ignores JSON keys that it does not know, so later writers add events and fields without a new version. The
//! version changes only when what is written today would mean something else.
//!
//! | tag | payload | content |
//! | --- | --- | --- |
//! | 1 header | JSON | [`TraceHeader`]: model, degrees, topology, policy settings, cost constants, placement 0 |
//! | 2 step | binary | [`StepRecord`]: the rows of one step with the experts of each |
//! | 3 switch | JSON | [`Switch`]: another placement is in force from this step on |
//! | 4 decision | JSON | [`Decision`]: the rebalancer's inputs and its verdict |
//! | 5 moves | JSON | [`Moves`]: weights have arrived |
//! | 6 gap | JSON | [`Gap`]: records that were lost here |
//! | 7 end | JSON | [`End`]: totals; the last record of a trace that was finished |
//! | 8 failure | JSON | [`Failure`]: a migration came to nothing |
//!
//! # A step
//! ```text
//! step   = step id, start us, duration us, placement version, rows of the whole step, pieces (varints), piece*
//! piece  = owner rank varint, rows varint, row{rows}, ids, weights
//! row    = flags u8, then unless flag 4 is set: zigzag(request id - that of the row before) varint, position varint
//! flags  = 1 decode (else prefill) | 2 recomputed after a preemption | 4 same request as the row before, next position
//! ids    = expert ids [layers][rows][k], ceil(log2 experts) bits each (at least 1), lowest bit first, padded to a byte
//! weights= the same shape, as the header says: none, f32 or bf16 (rounded to nearest even), little-endian
//! ```
//! A piece holds the rows one rank owns, laid out as that rank's router left them, so nothing is transposed. The rows
//! of a step are its pieces in rank order. Whoever holds all pieces writes them as one record. Ranks that record
//! without waiting for each other write several records with the same step id; each states the rows of the whole
//! step, and [`StepJoiner`] puts them together.
//!
//! # When things go wrong
//! A trace is written in place, one write per record, so a killed process leaves every finished record behind and at
//! most one that is cut; the reader reports the cut one as such. A trace without its end record is incomplete but
//! usable. Records that could not be written in time are lost and counted, and a gap record says where.

mod bits;
mod crc;
mod event;
mod header;
mod join;
mod reader;
mod sink;
mod step;
mod varint;
mod writer;

pub use event::{Decision, End, Event, Failure, Gap, Moves, Switch};
pub use header::{Degrees, TraceHeader, WeightFormat};
pub use join::StepJoiner;
pub use reader::{Record, TraceReader};
pub use sink::TraceSink;
pub use step::{Piece, PieceRecord, RowInfo, StepInfo, StepRecord};
pub use writer::{TraceCounters, TraceWriter};

/// First bytes of every trace.
const MAGIC: &[u8; 8] = b"MOEROUTE";
/// The version that is written and read.
const VERSION: u16 = 1;
/// Largest payload that is written, and that a reader accepts.
const MAX_PAYLOAD_BYTES: usize = 64 << 20;

/// What a frame holds.
mod tag {
    pub const HEADER: u8 = 1;
    pub const STEP: u8 = 2;
    pub const SWITCH: u8 = 3;
    pub const DECISION: u8 = 4;
    pub const MOVES: u8 = 5;
    pub const GAP: u8 = 6;
    pub const END: u8 = 7;
    pub const FAILURE: u8 = 8;
}

/// Appends one frame to `out`.
fn put_frame(out: &mut Vec<u8>, tag: u8, payload: &[u8]) {
    let start = out.len();
    out.push(tag);
    varint::put(out, payload.len() as u64);
    out.extend_from_slice(payload);
    let sum = crc::crc32(&[&out[start..]]);
    out.extend_from_slice(&sum.to_le_bytes());
}

#[cfg(test)]
mod tests;
