//! Answers that come before the whole request: the connection cannot be used again, and the client is told so.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use hyper::body::{Body, Frame, SizeHint};

/// Whether a request's body has been read to its end.
#[derive(Debug, Clone)]
pub struct Progress(Arc<AtomicBool>);

impl Progress {
    /// Some of the body is still on its way, or was never asked for.
    pub fn is_unfinished(&self) -> bool {
        !self.0.load(Ordering::Relaxed)
    }
}

/// A body that tells when it has been read.
#[derive(Debug)]
pub struct Watched<B> {
    body: B,
    progress: Progress,
}

impl<B: Body> Watched<B> {
    /// The body, and what becomes of it.
    pub fn new(body: B) -> (Watched<B>, Progress) {
        let progress = Progress(Arc::new(AtomicBool::new(body.is_end_stream())));
        (Watched { body, progress: progress.clone() }, progress)
    }
}

impl<B: Body + Unpin> Body for Watched<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let Watched { body, progress } = self.get_mut();
        let frame = Pin::new(&mut *body).poll_frame(context);
        if matches!(frame, Poll::Ready(None)) || body.is_end_stream() {
            progress.0.store(true, Ordering::Relaxed);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
