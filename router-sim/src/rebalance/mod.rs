//! Rebalancing: when to look at the load of a run, what to plan on, when to move experts.

mod mode;

pub use mode::Mode;
