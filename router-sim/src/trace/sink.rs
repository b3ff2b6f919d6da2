//! Writes a trace record by record on the caller's thread: for tools, which would rather wait than lose a record.

use std::io::Write;

use super::event::{End, put_json};
use super::header::TraceHeader;
use super::step::{self, Piece, StepInfo};
use super::{MAGIC, MAX_PAYLOAD_BYTES, VERSION, put_frame, tag};
use crate::{Error, Result};

/// A trace under way; [`TraceSink::finish`] ends it.
#[derive(Debug)]
pub struct TraceSink<W> {
    out: W,
    header: TraceHeader,
    records: u64,
    payload: Vec<u8>,
    frame: Vec<u8>,
}

impl<W: Write> TraceSink<W> {
    /// Writes the header.
    ///
    /// # Errors
    /// [`Error::Trace`] for a header that no reader would accept, or what `out` says.
    pub fn new(mut out: W, header: TraceHeader) -> Result<Self> {
        let payload = header.encode().map_err(|why| Error::Trace { record: 0, why })?;
        let mut frame = MAGIC.to_vec();
        frame.extend_from_slice(&VERSION.to_le_bytes());
        put_frame(&mut frame, tag::HEADER, &payload);
        out.write_all(&frame).map_err(|e| Error::Trace { record: 0, why: e.to_string() })?;
        Ok(TraceSink { out, header, records: 1, payload, frame })
    }

    /// Rows of a piece that are sure to fit a record.
    pub fn max_rows(&self) -> usize {
        // Flags, request and position take up to 21 bytes.
        let row = 21 + self.header.id_bits_per_row().div_ceil(8) + self.header.ids_per_row() * 4;
        (MAX_PAYLOAD_BYTES - 1024) / row
    }

    /// Writes a step, or a part of one.
    ///
    /// # Errors
    /// [`Error::Trace`] when the record is too large, or what `out` says.
    ///
    /// # Panics
    /// When a piece's lengths disagree, or it names a rank or an expert that does not exist.
    pub fn step(&mut self, info: &StepInfo, pieces: &[Piece<'_>]) -> Result<()> {
        self.payload.clear();
        step::encode(&mut self.payload, &self.header, info, pieces);
        self.write(tag::STEP)
    }

    /// Writes the end record and gives `out` back.
    ///
    /// # Errors
    /// What `out` says.
    pub fn finish(mut self) -> Result<W> {
        self.payload.clear();
        put_json(&mut self.payload, &End { steps: self.records - 1, lost_steps: 0, lost_events: 0 });
        self.write(tag::END)?;
        Ok(self.out)
    }

    fn write(&mut self, tag: u8) -> Result<()> {
        let refuse = |why| Error::Trace { record: self.records, why };
        let bytes = self.payload.len();
        if bytes > MAX_PAYLOAD_BYTES {
            return Err(refuse(format!("{bytes} bytes exceed the limit of {MAX_PAYLOAD_BYTES}")));
        }
        self.frame.clear();
        put_frame(&mut self.frame, tag, &self.payload);
        self.out.write_all(&self.frame).map_err(|e| refuse(e.to_string()))?;
        self.records += 1;
        Ok(())
    }
}
