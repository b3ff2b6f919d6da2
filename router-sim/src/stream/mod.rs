//! What a simulation runs on, one piece at a time: batches of tokens with the experts of each ([`TokenStream`]), or
//! load windows that only count ([`LoadStream`]). Either may be far larger than memory; a reader holds one piece.
//!
//! Recorded files ([`crate::formats`]) and synthetic traffic look alike from here on. Tokens become loads with
//! [`TokenLoads`]; the way back is a draw at random and belongs to the simulation. [`collect`] and [`total`] bring a
//! load stream into memory, bounded.

mod tokens;
mod loads;
pub(crate) mod rows;
pub(crate) mod windows;

pub use loads::{LoadStream, Summed, TokenLoads, collect, total};
pub use tokens::{TokenBatch, TokenRow, TokenShape, TokenStream};
