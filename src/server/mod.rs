//! HTTP: OpenAI's completions, what operators need, and nothing of how a model computes. The server holds an engine
//! handle and a tokenizer; it never sees a model, a backend or a communicator.
//!
//! A request: `connection` (hyper's limits) -> `routes` -> `body` (size, time, JSON) -> `request` (fields, ranges)
//! -> tokens -> `sequences` (engine streams) -> `transcript` (events become text) -> one object or `sse`.

// from socket to engine
mod options;
mod shutdown;
mod state;
mod connection;
mod routes;
mod body;
mod fields;
mod request;
mod completions;
// and back
mod sequences;
mod transcript;
mod sse;
mod types;
mod error;
mod id;
// what operators see
mod metrics;
mod load_metrics;

pub use connection::{bind, serve};
pub use metrics::{Info, Metrics, RankMemory};
pub use options::ServerOptions;
pub use request::SamplingDefaults;
pub use shutdown::{Shutdown, Stage};
pub use state::{AppState, Setup};
