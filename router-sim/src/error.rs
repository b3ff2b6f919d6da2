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

    /// A record of an input file is unusable.
    #[error("{path}: record {record}: {why}")]
    Record {
        /// The file in question.
        path: PathBuf,
        /// Counted from 0 in the order of the file.
        record: u64,
        /// What is wrong with it.
        why: String,
    },

    /// An input file as a whole is unusable, or an output cannot hold what it should.
    #[error("{path}: {why}")]
    File {
        /// The file in question.
        path: PathBuf,
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
