//! The log: lines on standard error, written by a thread of their own. Whoever logs never waits for the reader of a
//! pipe: a line that finds the queue full is dropped and counted, and the next one that is written says how many.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait for a slow reader.
const QUEUE: usize = 1024;
/// How long the end of the process waits for the last lines.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The log of this process, until it ends.
pub(super) struct Log {
    queue: SyncSender<Entry>,
    drained: Receiver<()>,
}

/// What the writing thread takes.
enum Entry {
    Line(Vec<u8>),
    /// Everything before this is to be written now: the process ends.
    End,
}

/// The counter of lines that this process dropped.
static DROPPED: LazyLock<Arc<AtomicU64>> = LazyLock::new(Arc::default);

/// See [`DROPPED`]; the metrics read it.
pub(super) fn dropped_lines() -> Arc<AtomicU64> {
    Arc::clone(&DROPPED)
}

impl Log {
    /// Sends everything that is logged from now on, panics included, to standard error. `MOEYARD_LOG` filters.
    pub(super) fn start(colours: bool) -> Log {
        let dropped = dropped_lines();
        let (lines, queue) = sync_channel(QUEUE);
        let (done, drained) = sync_channel(1);
        let counter = Arc::clone(&dropped);
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || {
                write_all(&queue, &counter, &mut io::stderr());
                // Nobody may wait for it any more.
                let _ = done.send(());
            })
            .expect("the system refuses one more thread");
        tracing_subscriber::fmt()
            .with_env_filter(
                EnvFilter::try_from_env("MOEYARD_LOG").unwrap_or_else(|_| EnvFilter::new("info")),
            )
            .with_writer(Lines { queue: lines.clone(), dropped })
            .with_ansi(colours)
            .with_target(false)
            .init();
        // The default hook writes to standard error itself, and would wait for its reader.
        std::panic::set_hook(Box::new(|panic| {
            let trace = Backtrace::capture();
            match trace.status() {
                BacktraceStatus::Captured => tracing::error!("{panic}\n{trace}"),
                _ => tracing::error!("{panic}"),
            }
        }));
        Log { queue: lines, drained }
    }

    /// Writes a last line, and waits a little for what is queued.
    pub(super) fn finish(self, last: Option<String>) {
        // A full queue means that nobody reads; then nobody is waited for.
        let line = last.map(|text| Entry::Line(format!("{text}\n").into_bytes()));
        let sent = line.into_iter().chain([Entry::End]).all(|entry| self.queue.try_send(entry).is_ok());
        if sent {
            let _ = self.drained.recv_timeout(LAST_WORDS);
        }
    }
}

/// Writes lines until the end.
fn write_all(queue: &Receiver<Entry>, dropped: &AtomicU64, out: &mut impl Write) {
    let mut told = 0;
    for entry in queue {
        let Entry::Line(line) = entry else { break };
        // A reader that is gone is no reason to end.
        let _ = out.write_all(&line);
        let now = dropped.load(Ordering::Relaxed);
        if now > told {
            let _ = writeln!(out, "({} lines of the log were dropped here, as nobody read it)", now - told);
            told = now;
        }
    }
    let _ = out.flush();
}

/// Makes a writer for each event.
struct Lines {
    queue: SyncSender<Entry>,
    dropped: Arc<AtomicU64>,
}

/// One event on its way to the queue.
struct Line<'a> {
    lines: &'a Lines,
    text: Vec<u8>,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { lines: self, text: Vec::new() }
    }
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        let text = std::mem::take(&mut self.text);
        if !text.is_empty() && self.lines.queue.try_send(Entry::Line(text)).is_err() {
            self.lines.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_drops_whole_lines_and_the_next_one_says_so() {
        let dropped = Arc::new(AtomicU64::new(0));
        let (sender, queue) = sync_channel(2);
        let lines = Lines { queue: sender, dropped: Arc::clone(&dropped) };
        for n in 0..5 {
            let mut line = lines.make_writer();
            write!(line, "line ").unwrap();
            writeln!(line, "{n}").unwrap();
        }
        assert_eq!(dropped.load(Ordering::Relaxed), 3);
        drop(lines);
        let mut out = Vec::new();
        write_all(&queue, &dropped, &mut out);
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text, "line 0\n(3 lines of the log were dropped here, as nobody read it)\nline 1\n");
    }
}
