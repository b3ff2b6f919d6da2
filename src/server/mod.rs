//! HTTP: OpenAI's completions, what operators need, and nothing of how a model computes. The server holds an engine
//! handle and a tokenizer; it never sees a model, a backend or a communicator.
//!
//! A request: `connection` -> `gate` (heads in order) -> `routes` -> `body` (size, time, JSON) -> `request` (fields, ranges)
//! -> tokens -> `sequences` (engine streams) -> `transcript` (events become text) -> one object or `sse`.

// from socket to engine
mod options;
mod shutdown;
mod state;
mod connection;
mod gate;
mod routes;
mod request_id;
mod auth;
mod body;
mod fields;
mod generation;
mod request;
mod messages;
mod tools;
mod chat_prompt;
mod chat_request;
mod structured;
mod completions;
mod chat;
mod tokenize;
mod models;
// and back
mod sequences;
mod transcript;
mod logprobs;
mod npy;
mod sse;
mod types;
mod unread;
mod chat_types;
mod error;
mod id;
// what operators see
mod operators;
mod openapi;
mod metrics;
mod registry;
mod load_metrics;
mod rank_metrics;
mod rebalance_metrics;
mod process;
mod experts;
mod dashboard;

pub use auth::ApiKeys;
pub use connection::{bind, serve, while_loading};
pub use error::ApiError;
pub use generation::SamplingDefaults;
pub use metrics::{Info, Metrics, RankMemory, SeriesOptions, Sources};
pub use options::ServerOptions;
pub use request::CompletionRequest;
pub use shutdown::{Shutdown, Stage};
pub use state::{AppState, Setup};
