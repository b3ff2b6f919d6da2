//! Continuous batching over a paged KV cache: requests in, token events out.
//!
//! One engine thread runs the [`scheduler`]; one OS thread per rank runs the model. The server and the command line
//! hold an [`EngineHandle`] and never see a model, a backend or a communicator.

pub mod kv_blocks;
pub mod plan;
pub mod rank;
pub mod request;
pub mod sampler;
pub mod scheduler;
