//! One error type: names the thing, the limit and the value.

use std::path::PathBuf;

/// What can be wrong with a placement, a load window or a trace.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A placement is refused.
    #[error("placement: {0}")]
    Placement(String),

    /// A cluster shape, policy or split is impossible.
    #[error("{0}")]
    Impossible(String),

    /// A description of a cluster, a model or cost constants is refused.
    #[error("{0}")]
    Description(String),

    /// A trace record is unusable.
    #[error("trace record {record}: {why}")]
    Trace {
        /// Counted from 0; the header is record 0.
        record: u64,
        /// What is wrong with it.
        why: String,
    },

    /// A file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// The file in question.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
}
