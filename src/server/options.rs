//! Limits of the HTTP surface. `config` fills them; tests shorten the times.

use std::time::Duration;

use super::auth::ApiKeys;

/// See each field; [`ServerOptions::default`] is what `moeyard serve` uses unless told otherwise.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Keys that requests must show one of; none asks for none.
    pub api_keys: ApiKeys,
    /// Headers of a request must arrive within this time, counted from the connection or the last response; so it also
    /// closes idle connections.
    pub header_read_timeout: Duration,
    /// Headers of one request.
    pub max_headers: usize,
    /// Bytes of one request's line and headers.
    pub max_header_bytes: usize,
    /// A body must arrive within this time, as a whole.
    pub body_read_timeout: Duration,
    /// Bytes of one body.
    pub max_body_bytes: usize,
    /// A comment line is sent in a stream that has been silent this long, so that proxies keep it.
    pub sse_keep_alive: Duration,
    /// A client that takes nothing of its stream for this long is dropped.
    pub stalled_reader_timeout: Duration,
    /// Running requests may go on for this long after a shutdown began.
    pub drain_timeout: Duration,
    /// After the engine died, this long passes before [`super::serve`] gives up, so that clients receive their errors.
    pub dead_engine_grace: Duration,
    /// Expert load is judged over windows of this length.
    pub load_window: Duration,
    /// Render the chat templates that requests bring. Steps are bounded, memory is not: only for trusted clients.
    pub trust_chat_template: bool,
    /// Prompts tokenised at the same time; more wait.
    pub tokenize_threads: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            api_keys: ApiKeys::default(),
            header_read_timeout: Duration::from_secs(10),
            max_headers: 100,
            max_header_bytes: 64 << 10,
            body_read_timeout: Duration::from_secs(60),
            max_body_bytes: 8 << 20,
            sse_keep_alive: Duration::from_secs(15),
            stalled_reader_timeout: Duration::from_secs(60),
            drain_timeout: Duration::from_secs(30),
            dead_engine_grace: Duration::from_secs(2),
            load_window: Duration::from_secs(10),
            trust_chat_template: false,
            tokenize_threads: 2,
        }
    }
}
