//! Simulation: what a placement policy, a split and a cluster make of a stream of tokens.
//!
//! [`Simulator`] takes one batch after another, deals every token to a slot by the code that the engine runs, and asks
//! the cost model ([`crate::cost`]) what each layer would take. With [`LiveRebalancing`] it watches the load, replans and
//! moves experts while it serves, by the engine's code; or it follows what an engine did, by its trace ([`ServedRun`]). Batches come from a recording or from [`Drawn`], or are
//! synthetic. The same input, settings and seed give the same report on any number of threads.

mod sources;
mod draw;
mod interleave;
mod shuffle;
mod tally;
mod migration;
mod rebalance;
mod served;
mod best;
mod lane;
mod spread;
mod timeline;
mod losses;
mod simulator;
mod scenario;
mod sweep;
mod pareto;

pub use draw::{DrawOptions, Drawn};
pub use interleave::Interleaved;
pub use lane::LayerStep;
pub use losses::{Levels, Reference, ReferenceLayer};
pub use pareto::pareto;
pub use rebalance::LiveRebalancing;
pub use scenario::{Choice, Observer, OpenTokens, Scenario};
pub use served::{Agreement, ServedRun, header};
pub use shuffle::Shuffled;
pub use simulator::{Setup, Simulator, StepFigures};
pub use sources::Sources;
pub use sweep::{SweepFile, sweep};
pub use tally::{LayerTally, OwnedRows};

#[cfg(test)]
mod tests;
