//! Reads a trace record by record.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::Path;

use super::event::{self, End, Event, Gap};
use super::header::TraceHeader;
use super::step::{self, StepRecord};
use super::varint::Decoder;
use super::{MAGIC, MAX_PAYLOAD_BYTES, VERSION, crc, tag};
use crate::{Error, Result};

/// One record after the header.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// A step, or a part of one.
    Step(StepRecord),
    /// Something between steps.
    Event(Event),
    /// Records are missing here.
    Gap(Gap),
}

/// Iterates over the records of a trace. Holds one record at a time, however long the trace is.
///
/// An `Err` names the record and what is wrong with it. Where the record's frame is sound (a wrong checksum, an expert
/// that does not exist) the next call goes on with the next record; where it is not (a cut, an absurd length) the
/// iteration ends.
#[derive(Debug)]
pub struct TraceReader<R> {
    input: R,
    header: TraceHeader,
    frames: Frames,
    end: Option<End>,
    skipped: u64,
}

/// Where a reader is among the frames.
#[derive(Debug)]
struct Frames {
    /// Number of the frame to be read next.
    next: u64,
    /// Payload of the frame read last; reused.
    payload: Vec<u8>,
    /// Nothing more can be read.
    over: bool,
}

impl TraceReader<BufReader<File>> {
    /// Opens a file or pipe and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened, otherwise as [`TraceReader::new`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|source| Error::Io { path: path.into(), source })?;
        TraceReader::new(BufReader::new(file))
    }
}

impl<R: Read> TraceReader<R> {
    /// Reads the header. `input` is read in small pieces and should be buffered.
    ///
    /// # Errors
    /// [`Error::Trace`] for record 0 when this is no trace, of another version, or its header is cut or wrong.
    pub fn new(mut input: R) -> Result<Self> {
        let mut frames = Frames { next: 0, payload: Vec::new(), over: false };
        let header = take_preamble(&mut input).and_then(|()| match frames.read(&mut input)? {
            Some((tag::HEADER, Ok(()))) => TraceHeader::decode(&frames.payload),
            Some((tag::HEADER, Err(why))) => Err(why),
            Some((tag, _)) => Err(format!("tag {tag} where the header (tag {}) is due", tag::HEADER)),
            None => Err("the trace ends before its header".into()),
        });
        let header = header.map_err(|why| Error::Trace { record: 0, why })?;
        Ok(TraceReader { input, header, frames, end: None, skipped: 0 })
    }

    /// What the run was.
    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    /// The totals of the end record, once it was read. `None` after the last record means that the writer did not
    /// finish: it was killed, or its disk failed.
    pub fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// Records skipped because a later writer knows more kinds than this reader.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Number of the record that was read last, or failed; the header is 0.
    pub fn record(&self) -> u64 {
        self.frames.next.saturating_sub(1)
    }

    /// The next record that is known; `Ok(None)` at the end.
    fn next_record(&mut self) -> Result<Option<Record>, String> {
        while let Some((tag, intact)) = self.frames.read(&mut self.input)? {
            intact?;
            if self.end.is_some() {
                self.frames.over = true;
                return Err(format!("tag {tag} after the end record"));
            }
            let payload = &self.frames.payload;
            match tag {
                tag::STEP => return step::decode(payload, &self.header).map(|step| Some(Record::Step(step))),
                tag::GAP => return event::take_json(payload).map(|gap| Some(Record::Gap(gap))),
                tag::END => self.end = Some(event::take_json(payload)?),
                tag::HEADER => return Err("a second header".into()),
                _ => match Event::decode(tag, payload, &self.header) {
                    Some(event) => return event.map(|event| Some(Record::Event(event))),
                    None => self.skipped += 1,
                },
            }
        }
        Ok(None)
    }
}

impl<R: Read> Iterator for TraceReader<R> {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        let record = self.next_record();
        // `read` has counted the frame already.
        record.map_err(|why| Error::Trace { record: self.record(), why }).transpose()
    }
}

/// A frame's tag, and whether its checksum holds.
type Frame = (u8, Result<(), String>);

impl Frames {
    /// Reads the next frame's payload. `Ok(None)` between two frames at the end of the input.
    ///
    /// # Errors
    /// When the borders of the frame are lost; nothing more is read then.
    fn read(&mut self, input: &mut impl Read) -> Result<Option<Frame>, String> {
        if self.over {
            return Ok(None);
        }
        let frame = self.read_frame(input);
        self.over = !matches!(frame, Ok(Some(_)));
        if !matches!(frame, Ok(None)) {
            self.next += 1;
        }
        frame
    }

    fn read_frame(&mut self, input: &mut impl Read) -> Result<Option<Frame>, String> {
        let mut head = Vec::with_capacity(8);
        let Some(tag) = read_byte(input)? else { return Ok(None) };
        head.push(tag);
        let mut length = Decoder::default();
        let length = loop {
            let byte = read_byte(input)?.ok_or("cut within its length")?;
            head.push(byte);
            if let Some(length) = length.push(byte)? {
                break length;
            }
        };
        if length > MAX_PAYLOAD_BYTES as u64 {
            return Err(format!("a payload of {length} bytes exceeds the limit of {MAX_PAYLOAD_BYTES}"));
        }
        self.payload.clear();
        // `read_to_end` grows with what arrives: a length that lies costs no memory.
        input.take(length).read_to_end(&mut self.payload).map_err(|e| e.to_string())?;
        let mut sum = [0; 4];
        if (self.payload.len() as u64) < length {
            return Err(format!("cut after {} of {length} bytes", self.payload.len()));
        }
        for byte in &mut sum {
            *byte = read_byte(input)?.ok_or("cut within its checksum")?;
        }
        let found = crc::crc32(&[&head, &self.payload]);
        let written = u32::from_le_bytes(sum);
        let intact = match found == written {
            true => Ok(()),
            false => Err(format!("checksum {found:08x}, but {written:08x} was written")),
        };
        Ok(Some((tag, intact)))
    }
}

/// Checks magic and version.
fn take_preamble(input: &mut impl Read) -> Result<(), String> {
    let mut preamble = Vec::with_capacity(MAGIC.len() + 2);
    input.take(MAGIC.len() as u64 + 2).read_to_end(&mut preamble).map_err(|e| e.to_string())?;
    match preamble.split_first_chunk() {
        None if preamble.is_empty() => Err("the trace is empty".into()),
        Some((MAGIC, &[low, high])) => match u16::from_le_bytes([low, high]) {
            VERSION => Ok(()),
            other => Err(format!("version {other} is unknown, this reader knows {VERSION}")),
        },
        Some((MAGIC, _)) => Err("cut within its version".into()),
        _ => {
            Err(format!("not a routing trace: it does not begin with {:?}", MAGIC.escape_ascii().to_string()))
        }
    }
}

/// One byte; `None` at the end of the input.
fn read_byte(input: &mut impl Read) -> Result<Option<u8>, String> {
    let mut byte = [0];
    loop {
        match input.read(&mut byte) {
            Ok(n) => return Ok((n == 1).then_some(byte[0])),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e.to_string()),
        }
    }
}
