//! One error type for every floor: each variant has typed fields and a message that names the thing, the
//! limit and the value given. `cli` maps it to an exit code and `server` to a status, each in one match.

use std::fmt;
use std::path::PathBuf;

/// Shorthand used on every floor.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong and is not a bug.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A checkpoint cannot be served: every problem found, not only the first.
    #[error("{0}")]
    Checkpoint(Problems),

    /// A flag, configuration key or combination of them is refused.
    #[error("{what}: {why}")]
    Config {
        /// The flag, key or file as the user wrote it.
        what: String,
        /// Limit and given value, in words.
        why: String,
    },

    /// Weights, KV cache and working space do not fit; the message carries the sum.
    #[error("not enough memory on {device}: {sum}")]
    Memory {
        /// Which device ran out.
        device: String,
        /// "weights 1.0 GiB + KV 2.0 GiB + working space 0.1 GiB = 3.1 GiB > 3.0 GiB available"
        sum: String,
    },

    /// A device failed.
    #[error("{device}: {why}")]
    Device {
        /// Which one.
        device: String,
        /// What was done, and what the driver said.
        why: String,
    },

    /// A client's request is refused; nothing of it was run.
    #[error("{message}")]
    Request {
        /// The JSON field, where one is to blame.
        param: Option<String>,
        /// Names the parameter, the limit and the value.
        message: String,
    },

    /// The engine cannot take this request now; a later try may succeed.
    #[error("{message}")]
    Busy {
        /// Which limit was reached.
        limit: QueueLimit,
        /// What is full.
        message: String,
        /// When to try again, in seconds.
        retry_after_s: u32,
    },

    /// It cannot be done while something else is under way; a later try may succeed.
    #[error("{0}")]
    Conflict(String),

    /// Another rank failed or left while this one waited for it.
    #[error("rank {rank}: {why}")]
    Peer {
        /// The rank that reports.
        rank: usize,
        /// What it saw.
        why: String,
    },

    /// The engine is stopping or has stopped.
    #[error("the engine has stopped: {0}")]
    Stopped(String),

    /// Another server, one that is measured, refused or failed.
    #[error("{0}")]
    Remote(String),

    /// A file or socket operation failed.
    #[error("{path}: {source}")]
    Io {
        /// The path or address in question.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },

    /// A placement, load window or trace was refused by router-sim.
    #[error(transparent)]
    Routing(#[from] router_sim::Error),
}

/// What of the queue is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueLimit {
    /// The number of requests.
    Requests,
    /// Their prompt tokens.
    Tokens,
}

impl Error {
    /// A refused flag, key or combination.
    pub fn config(what: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Config { what: what.into(), why: why.into() }
    }

    /// A refused request field.
    pub fn request(param: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Request { param: Some(param.into()), message: message.into() }
    }

    /// An I/O error with the path it happened at.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }
}

/// How the refusal of a request begins that is longer than the context: clients look for these words.
pub const CONTEXT_PHRASE: &str = "This model's maximum context length is";

/// One thing wrong with a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file at fault, relative to the checkpoint folder.
    pub file: String,
    /// The tensor or config key at fault, where there is one.
    pub item: Option<String>,
    /// What was expected.
    pub expected: String,
    /// What was found.
    pub found: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        if let Some(item) = &self.item {
            write!(f, ": {item}")?;
        }
        write!(f, ": expected {}, found {}", self.expected, self.found)
    }
}

/// All problems of one checkpoint, printed one per line.
#[derive(Debug, Default)]
pub struct Problems {
    /// The checkpoint folder as given.
    pub checkpoint: String,
    /// In the order found; never empty inside an [`Error::Checkpoint`].
    pub list: Vec<Problem>,
}

impl Problems {
    /// Starts an empty list for one checkpoint.
    pub fn new(checkpoint: impl Into<String>) -> Self {
        Problems { checkpoint: checkpoint.into(), list: Vec::new() }
    }

    /// Notes one more problem.
    pub fn add(
        &mut self,
        file: impl Into<String>,
        item: impl Into<Option<String>>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) {
        self.list.push(Problem {
            file: file.into(),
            item: item.into(),
            expected: expected.into(),
            found: found.into(),
        });
    }

    /// `Err` with the whole list when anything was noted.
    pub fn into_result(self) -> Result<()> {
        if self.list.is_empty() { Ok(()) } else { Err(Error::Checkpoint(self)) }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.list.len();
        write!(f, "{}: {n} problem{} in this checkpoint", self.checkpoint, if n == 1 { "" } else { "s" })?;
        for problem in &self.list {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}
