//! HTTP: OpenAI's completions, what operators need, and nothing of how a model computes. The server holds an engine
//! handle and a tokenizer; it never sees a model, a backend or a communicator.
//!
//! A request: [`connection`] (hyper's limits) -> [`routes`] -> `body` (size, time, JSON) -> [`request`] (fields, ranges)
//! -> tokens -> [`sequences`] (engine streams) -> [`transcript`] (events become text) -> one object or [`sse`].

// from socket to engine
pub mod options;
pub mod shutdown;
pub mod state;
pub mod connection;
pub mod routes;
mod body;
mod fields;
pub mod request;
pub mod completions;
// and back
pub mod sequences;
pub mod transcript;
pub mod sse;
pub mod types;
pub mod error;
mod id;
// what operators see
pub mod metrics;
mod load_metrics;

pub use connection::{bind, serve};
pub use metrics::{Info, Metrics, RankMemory};
pub use options::ServerOptions;
pub use request::SamplingDefaults;
pub use shutdown::{Shutdown, Stage};
pub use state::{AppState, Setup};
