//! moeyard, a Mixture-of-Experts serving engine built around expert parallelism.
//!
//! Modules in reading order, lowest floor first; each imports strictly lower floors only (tests/floors.rs).

// floor 0: what everything may use
pub mod error;
pub mod metrics;
pub mod spec;
// floor 1: a device that computes
pub mod backend;
// floor 2: ranks that talk, checkpoints, text
pub mod comm;
pub mod tokenizer;
pub mod weights;
// floor 3: layers of a transformer
pub mod layers;
// floor 4: the MoE layer, from router to combine
pub mod moe;
// floor 5: the forward pass and the families
pub mod model;
// floor 6: continuous batching
pub mod engine;
// floor 7: HTTP
pub mod server;
// floor 8: what the user wrote -> what the program runs on
pub mod config;
// floor 9: the command line
pub mod cli;

pub use error::{Error, Result};

// What unit and integration tests have in common; it names the crate from outside.
#[cfg(test)]
extern crate self as moeyard;
#[cfg(test)]
#[path = "../tests/support"]
mod support {
    pub mod collectives;
    pub mod draws;
    pub mod moe_rank;
    pub mod numbers;
    pub mod patience;
    pub mod placements;
    pub mod threads;
}
