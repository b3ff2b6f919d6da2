//! Between socket and hyper: every head of a request is judged before hyper reads it. hyper resolves doubts about where a
//! body ends silently (it drops a Content-Length beside a Transfer-Encoding), and its own refusals have no error object.
//!
//! Bodies pass unchanged, straight into hyper's buffer; the gate only follows where they end. In place of a refused request
//! hyper reads a plain one, which the router answers with the error.

mod framing;
mod head;
mod refusal;
#[cfg(test)]
mod tests;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::error::ApiError;
use super::options::ServerOptions;
use framing::Framing;
use head::Limits;
pub use refusal::{Refusals, answer};

/// What hyper reads instead of a refused request.
const REFUSED: &[u8] = b"GET /refused HTTP/1.1\r\nHost: gate\r\nConnection: close\r\n\r\n";
/// The same for a client that expects no body.
const REFUSED_HEAD: &[u8] = b"HEAD /refused HTTP/1.1\r\nHost: gate\r\nConnection: close\r\n\r\n";

/// A socket that hands out requests in order only.
pub struct Gate<S> {
    socket: S,
    limits: Limits,
    /// Read and not handed out.
    held: BytesMut,
    /// Bytes of `held` that may be handed out.
    cleared: usize,
    /// Bytes of `held` that are known not to be a whole head.
    searched: usize,
    /// Of the request that is handed out.
    body: Framing,
    /// Requests handed out.
    requests: u64,
    refusals: Refusals,
    /// How long a client whose request is not read to its end may go on sending.
    patience: Duration,
    lingering: Option<Pin<Box<Sleep>>>,
}

impl<S> Gate<S> {
    pub fn new(socket: S, options: &ServerOptions) -> Self {
        Gate {
            socket,
            limits: Limits::of(options),
            held: BytesMut::new(),
            cleared: 0,
            searched: 0,
            body: Framing::NONE,
            requests: 0,
            refusals: Refusals::default(),
            patience: options.header_read_timeout,
            lingering: None,
        }
    }

    /// Where its refusals can be seen.
    pub fn refusals(&self) -> Refusals {
        self.refusals.clone()
    }

    /// Clears what is held, as far as it can be judged; `ended` when no more will come. False when more is needed.
    fn judge(&mut self, ended: bool) -> bool {
        if !self.body.is_complete() {
            self.cleared = self.body.follow(&self.held);
            return self.cleared > 0 || self.body.is_broken();
        }
        while let Some(length) = line_break(&self.held) {
            self.held.advance(length);
            self.searched = 0;
        }
        let decidable = self.searched == 0
            || has_empty_line(&self.held, self.searched)
            || self.held.len() > self.limits.bytes
            || ended;
        if self.held.is_empty() || !decidable {
            self.searched = self.held.len();
            return false;
        }
        match head::judge(&self.held, &self.limits) {
            Ok(Some(head)) => {
                self.requests += 1;
                self.searched = 0;
                self.body = head.body;
                self.cleared = head.bytes + self.body.follow(&self.held[head.bytes..]);
            }
            Ok(None) => {
                self.searched = self.held.len();
                return false;
            }
            Err(error) => self.refuse(error),
        }
        true
    }

    fn refuse(&mut self, error: ApiError) {
        self.refusals.refuse(self.requests, error);
        let instead = if self.held.starts_with(b"HEAD ") { REFUSED_HEAD } else { REFUSED };
        self.held = BytesMut::from(instead);
        self.cleared = instead.len();
    }
}

/// The length of the line break at the start, if any.
fn line_break(bytes: &[u8]) -> Option<usize> {
    [&b"\r\n"[..], b"\n"].into_iter().find(|line_break| bytes.starts_with(line_break)).map(<[u8]>::len)
}

/// Whether an empty line ends behind the first `searched` bytes, so that slow senders are not parsed byte by byte.
fn has_empty_line(bytes: &[u8], searched: usize) -> bool {
    let tail = &bytes[searched.saturating_sub(3)..];
    tail.windows(2).any(|pair| pair == b"\n\n") || tail.windows(3).any(|three| three == b"\n\r\n")
}

impl<S: AsyncRead + Unpin> AsyncRead for Gate<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let gate = self.get_mut();
        loop {
            if gate.cleared > 0 {
                let length = gate.cleared.min(out.remaining());
                out.put_slice(&gate.held[..length]);
                gate.held.advance(length);
                gate.cleared -= length;
                return Poll::Ready(Ok(()));
            }
            if gate.refusals.any() {
                // hyper answers and closes; there is nothing to wake it up for.
                return Poll::Pending;
            }
            if gate.body.is_broken() {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "malformed chunks")));
            }
            if !gate.held.is_empty() && gate.judge(false) {
                continue;
            }
            let before = out.filled().len();
            ready!(Pin::new(&mut gate.socket).poll_read(context, out))?;
            let new = &out.filled()[before..];
            if new.is_empty() {
                if !gate.held.is_empty() && gate.judge(true) {
                    continue;
                }
                return Poll::Ready(Ok(()));
            }
            let passed = if gate.held.is_empty() { gate.body.follow(new) } else { 0 };
            gate.held.extend_from_slice(&new[passed..]);
            out.set_filled(before + passed);
            if passed > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Gate<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(context)
    }

    /// Ends the answers. What a client still sends of a request that was answered early is then read and dropped for a
    /// while: closing a socket with unread bytes resets the connection, and the client would lose its answer.
    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let gate = self.get_mut();
        if gate.lingering.is_none() {
            ready!(Pin::new(&mut gate.socket).poll_shutdown(context))?;
            if gate.body.is_complete() && !gate.refusals.any() {
                return Poll::Ready(Ok(()));
            }
        }
        let patience = gate.patience;
        let end = gate.lingering.get_or_insert_with(|| Box::pin(sleep(patience)));
        let mut dropped = [0; 4096];
        while end.as_mut().poll(context).is_pending() {
            let mut dropped = ReadBuf::new(&mut dropped);
            ready!(Pin::new(&mut gate.socket).poll_read(context, &mut dropped))?;
            if dropped.filled().is_empty() {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }
}
