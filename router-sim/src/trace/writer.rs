//! Records a trace beside a serving engine without ever holding it up.
//!
//! The serving side packs a record into a reused buffer and hands it to a thread; the thread adds length and checksum
//! and writes. Neither a slow disk nor a pipe that nobody reads is waited for: when all buffers are under way, the
//! record is lost, counted, and named by a gap record as soon as there is room. When a write fails, the trace stops
//! where it is and everything after that is lost and counted.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use std::time::Duration;

use super::event::{End, Event, Gap, put_json};
use super::header::TraceHeader;
use super::step::{self, Piece, StepInfo};
use super::{MAGIC, MAX_PAYLOAD_BYTES, VERSION, put_frame, tag};
use crate::{Error, Result};

/// Records that may be under way.
pub(super) const QUEUE_RECORDS: usize = 256;
/// Bytes that may be under way before further records are lost.
const QUEUE_BYTES: usize = 64 << 20;

/// The serving side's end of a trace.
#[derive(Debug)]
pub struct TraceWriter {
    path: PathBuf,
    header: TraceHeader,
    queue: SyncSender<Message>,
    /// Empty buffers that the thread gave back.
    free: Receiver<Vec<u8>>,
    /// A buffer that was taken and not sent.
    spare: Option<Vec<u8>>,
    /// Buffers made so far, only when none is free: [`QUEUE_RECORDS`] of them and none free means that as many records
    /// are under way.
    buffers: usize,
    /// The thread's last word.
    done: Receiver<io::Result<()>>,
    counters: Arc<TraceCounters>,
    /// Losses that the trace does not tell of yet.
    gap: Option<Gap>,
    end: End,
    closed: bool,
}

/// What became of the records, for metrics; counts only grow.
#[derive(Debug, Default)]
pub struct TraceCounters {
    written_records: AtomicU64,
    written_bytes: AtomicU64,
    lost_records: AtomicU64,
    errors: AtomicU64,
    queued_bytes: AtomicUsize,
}

impl TraceCounters {
    /// Steps and events written.
    pub fn written_records(&self) -> u64 {
        self.written_records.load(Relaxed)
    }

    /// Bytes written, the header's and those of gaps included.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes.load(Relaxed)
    }

    /// Steps and events that could not be written.
    pub fn lost_records(&self) -> u64 {
        self.lost_records.load(Relaxed)
    }

    /// Failed writes. The first one stops the trace.
    pub fn errors(&self) -> u64 {
        self.errors.load(Relaxed)
    }
}

enum Message {
    Record { gap: Option<Gap>, tag: u8, payload: Vec<u8> },
    End { gap: Option<Gap>, end: End },
}

impl TraceWriter {
    /// Starts a trace at `path`; a file that is there is overwritten. A pipe is opened by the thread, because opening
    /// one waits for its reader.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be created or the thread not be started, [`Error::Trace`] for a header that
    /// no reader would accept.
    pub fn create(path: &Path, header: TraceHeader) -> Result<Self> {
        let special = fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir());
        if special {
            let owned = path.to_owned();
            return TraceWriter::start(path, header, move || File::options().write(true).open(owned));
        }
        let file = File::create(path).map_err(|source| Error::Io { path: path.into(), source })?;
        TraceWriter::start(path, header, || Ok(file))
    }

    /// Starts a trace on anything that takes bytes; `open` runs on the thread. `path` is for messages.
    pub(super) fn start<W: Write>(
        path: &Path,
        header: TraceHeader,
        open: impl FnOnce() -> io::Result<W> + Send + 'static,
    ) -> Result<Self> {
        let payload = header.encode().map_err(|why| Error::Trace { record: 0, why })?;
        let mut preamble = MAGIC.to_vec();
        preamble.extend_from_slice(&VERSION.to_le_bytes());
        put_frame(&mut preamble, tag::HEADER, &payload);
        // One place more than there are buffers: the end record always finds room.
        let (queue, messages) = mpsc::sync_channel(QUEUE_RECORDS + 1);
        let (give_back, free) = mpsc::sync_channel(QUEUE_RECORDS);
        let (last_word, done) = mpsc::sync_channel(1);
        let counters = Arc::new(TraceCounters::default());
        let thread_counters = Arc::clone(&counters);
        let run = move || {
            let outcome = write_all(open, preamble, &messages, &give_back, &thread_counters);
            if outcome.is_err() {
                thread_counters.errors.fetch_add(1, Relaxed);
                // No buffer is given back any more: soon the serving side does not even pack.
                lose_rest(&messages, &thread_counters);
            }
            // Nobody may be waiting.
            let _ = last_word.send(outcome);
        };
        thread::Builder::new()
            .name("routing-trace".into())
            .spawn(run)
            .map_err(|source| Error::Io { path: path.into(), source })?;
        Ok(TraceWriter {
            path: path.into(),
            header,
            queue,
            free,
            spare: None,
            buffers: 0,
            done,
            counters,
            gap: None,
            end: End::default(),
            closed: false,
        })
    }

    /// What becomes of the records; stays valid after the trace.
    pub fn counters(&self) -> Arc<TraceCounters> {
        Arc::clone(&self.counters)
    }

    /// Records a step, or a part of one. Never waits; in a steady state it does not allocate either.
    ///
    /// # Panics
    /// When a piece's lengths disagree, or it names a rank or an expert that does not exist.
    pub fn step(&mut self, info: &StepInfo, pieces: &[Piece<'_>]) {
        self.end.steps += 1;
        let recorded = match self.buffer() {
            None => false,
            Some(mut payload) => {
                step::encode(&mut payload, &self.header, info, pieces);
                self.send(tag::STEP, payload)
            }
        };
        if !recorded {
            self.end.lost_steps += 1;
            self.lose(info.step).steps += 1;
        }
    }

    /// Records an event. Never waits.
    pub fn event(&mut self, event: &Event) {
        let recorded = match self.buffer() {
            None => false,
            Some(mut payload) => {
                event.encode(&mut payload);
                self.send(event.tag(), payload)
            }
        };
        if !recorded {
            self.end.lost_events += 1;
            self.lose(event.step()).events += 1;
        }
    }

    /// Ends the trace and waits until it is written, at most for `patience`. Dropping a writer ends the trace too, but
    /// does not wait.
    ///
    /// # Errors
    /// [`Error::Io`] with the first failure of the trace, or with `TimedOut`.
    pub fn finish(mut self, patience: Duration) -> Result<()> {
        self.close();
        let outcome = self.done.recv_timeout(patience).unwrap_or_else(|_| {
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("not written within {patience:?}")))
        });
        outcome.map_err(|source| Error::Io { path: self.path.clone(), source })
    }

    /// An empty buffer, when another record may be under way.
    fn buffer(&mut self) -> Option<Vec<u8>> {
        if self.counters.queued_bytes.load(Relaxed) > QUEUE_BYTES {
            return None;
        }
        if let Some(buffer) = self.spare.take().or_else(|| self.free.try_recv().ok()) {
            return Some(buffer);
        }
        (self.buffers < QUEUE_RECORDS).then(|| {
            self.buffers += 1;
            Vec::new()
        })
    }

    /// Hands a record to the thread; false when it is lost.
    fn send(&mut self, tag: u8, mut payload: Vec<u8>) -> bool {
        let bytes = payload.len();
        if bytes > MAX_PAYLOAD_BYTES {
            payload.clear();
            self.spare = Some(payload);
            return false;
        }
        self.counters.queued_bytes.fetch_add(bytes, Relaxed);
        let sent = self.queue.try_send(Message::Record { gap: self.gap, tag, payload }).is_ok();
        if sent {
            self.gap = None;
        }
        sent
    }

    /// The gap to count a lost record of this step in.
    fn lose(&mut self, step: u64) -> &mut Gap {
        self.counters.lost_records.fetch_add(1, Relaxed);
        let gap = self.gap.get_or_insert(Gap { first_step: step, last_step: step, steps: 0, events: 0 });
        gap.first_step = gap.first_step.min(step);
        gap.last_step = gap.last_step.max(step);
        gap
    }

    fn close(&mut self) {
        if !self.closed {
            self.closed = true;
            // Fails only when the thread is gone, and then there is nothing to end.
            let _ = self.queue.try_send(Message::End { gap: self.gap, end: self.end });
        }
    }
}

impl Drop for TraceWriter {
    fn drop(&mut self) {
        self.close();
    }
}

/// The thread: writes until the end record, one write per message so that a killed process leaves whole records.
fn write_all<W: Write>(
    open: impl FnOnce() -> io::Result<W>,
    preamble: Vec<u8>,
    messages: &Receiver<Message>,
    give_back: &SyncSender<Vec<u8>>,
    counters: &TraceCounters,
) -> io::Result<()> {
    let mut sink = open()?;
    let mut out = preamble;
    let (mut in_hand, mut ended) = (0, false);
    loop {
        sink.write_all(&out).inspect_err(|_| {
            counters.lost_records.fetch_add(in_hand, Relaxed);
        })?;
        counters.written_records.fetch_add(in_hand, Relaxed);
        counters.written_bytes.fetch_add(out.len() as u64, Relaxed);
        if ended {
            return sink.flush();
        }
        out.clear();
        let message = messages.recv().expect("a writer sends its end record before it goes");
        let (Message::Record { gap, .. } | Message::End { gap, .. }) = &message;
        if let Some(gap) = gap {
            put_json_frame(&mut out, tag::GAP, gap);
        }
        match message {
            Message::Record { tag, payload, .. } => {
                put_frame(&mut out, tag, &payload);
                recycle(payload, give_back, counters);
                in_hand = 1;
            }
            Message::End { end, .. } => {
                put_json_frame(&mut out, tag::END, &end);
                (in_hand, ended) = (0, true);
            }
        }
    }
}

fn put_json_frame<T: serde::Serialize>(out: &mut Vec<u8>, tag: u8, value: &T) {
    let mut payload = Vec::new();
    put_json(&mut payload, value);
    put_frame(out, tag, &payload);
}

/// Gives a buffer back; a large one gives its memory up, so that idle buffers hold at most [`QUEUE_BYTES`].
fn recycle(mut payload: Vec<u8>, give_back: &SyncSender<Vec<u8>>, counters: &TraceCounters) {
    counters.queued_bytes.fetch_sub(payload.len(), Relaxed);
    payload.clear();
    payload.shrink_to(QUEUE_BYTES / QUEUE_RECORDS);
    // Fails only when the writer is gone and needs no buffers.
    let _ = give_back.try_send(payload);
}

/// After a failure: counts what still arrives.
fn lose_rest(messages: &Receiver<Message>, counters: &TraceCounters) {
    for message in messages {
        match message {
            Message::Record { .. } => counters.lost_records.fetch_add(1, Relaxed),
            Message::End { .. } => return,
        };
    }
}
