//! Answers as server-sent events: chunks, perhaps a last one, `[DONE]`; an error takes the place of what would follow.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use http::header::HeaderName;
use serde::Serialize;
use tokio_stream::Stream;

use super::error::ApiError;
use super::options::ServerOptions;

/// One chunk's JSON, or the error that ends the stream.
pub type Chunk = Result<String, ApiError>;

/// Where the chunks of a stream come from. Dropped when the client leaves.
pub trait Source: Send + Unpin + 'static {
    /// The next chunk; `None` at the regular end.
    fn poll_chunk(&mut self, context: &mut Context<'_>) -> Poll<Option<Chunk>>;

    /// What follows the regular end (usage, where asked for).
    fn last_chunk(&mut self) -> Option<String>;
}

/// The streaming response over `source`.
pub fn response(source: impl Source, options: &ServerOptions) -> Response {
    let events = Events { source: Some(source), tail: VecDeque::new() };
    let keep_alive = KeepAlive::new().interval(options.sse_keep_alive).text("keep-alive");
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    // nginx would gather the events of seconds otherwise.
    response
        .headers_mut()
        .insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// JSON of a response type.
pub fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("response types have string keys and finite numbers")
}

/// The events of one stream.
struct Events<S> {
    /// `None` once it has ended; dropped at once, so that an error ends the other sequences too.
    source: Option<S>,
    /// What is still to be sent after that.
    tail: VecDeque<String>,
}

impl<S: Source> Stream for Events<S> {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(source) = &mut self.source {
            let ended = match ready!(source.poll_chunk(context)) {
                Some(Ok(chunk)) => return Poll::Ready(Some(Ok(Event::default().data(chunk)))),
                Some(Err(error)) => Some(json(&error.body())),
                None => source.last_chunk(),
            };
            self.tail.extend(ended);
            self.tail.push_back("[DONE]".into());
            self.source = None;
        }
        Poll::Ready(self.tail.pop_front().map(|data| Ok(Event::default().data(data))))
    }
}
