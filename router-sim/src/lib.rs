//! Everything about expert routing that needs no tensor: where experts live ([`placement`]), how tokens are
//! shared out among copies ([`split`]), how loaded they are ([`load`]), and the recorded history ([`trace`]).
//! The serving engine imports these modules, so what is simulated is what is served. A simulation reads records of
//! many tools ([`formats`]), or makes traffic up ([`synth`]), as streams of token batches or load windows ([`stream`]).

pub mod bounds;
pub mod cost;
pub mod error;
pub mod load;
pub mod placement;
pub mod report;
pub mod split;
pub mod topology;
pub mod rebalance;
pub mod simulate;
pub mod advise;
pub mod trace;
pub mod stream;
pub mod formats;
pub mod synth;
pub mod whole;

pub use error::Error;

/// Shorthand for this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
