//! Rebalancing: when to look at the load of a run, what to plan on, whether moving experts pays, and when to be patient.
//!
//! Pure: no clock, no thread. The engine and the simulator drive the same [`Rebalancer`]; everything it decides from is
//! either load, counted exactly, or among the [`Inputs`] that a trace keeps with each decision. So whoever replays a trace
//! decides alike.
//!
//! # A look
//! The load of the latest steps is kept in parts ([`Rebalancing::parts`]). At a look, the policy plans on all of them, and
//! each layer is judged by itself. What a placement costs is the rows of the slowest rank, in every layer and phase, times
//! the microseconds of a row; chance counts as lost in any case ([`bounds::sampling_floor`](crate::bounds::sampling_floor)), so that a plan fitted to noise
//! promises nothing. A layer's experts move when that saves at least [`Rebalancing::min_gain`] of the layer's cost and, in
//! mode auto, when
//! ```text
//! gain per step x horizon >= 2 x (weights of the rank that receives most / bandwidth + switch)
//! ```
//! The horizon is as many steps as the gain has existed: the newest parts of the window in which the plan is better, one
//! after another. What has lasted that long is expected to last as long again (as in ski rental), times a trust that
//! doubles, up to 8, with each migration that kept its promise.
//!
//! # Patience
//! In mode auto, a migration rests for a window before the next one. Then the load that came since tells what it really
//! saved against the placement before it. Less than half of the promise doubles the rest, at most to 64 windows, and
//! takes the trust away; a kept promise halves it again. So load that turns around after each move makes fewer and fewer
//! moves. A migration that failed is tried again after twice, four times, ... the interval.

mod mode;
mod settings;
mod inputs;
mod row_time;
mod window;
mod forecast;
mod patience;
mod look;
mod rebalancer;

pub use forecast::Forecast;
pub use inputs::Inputs;
pub use look::{Look, OPERATOR, Verdict};
pub use mode::Mode;
pub use rebalancer::{Due, Rebalancer};
pub use row_time::RowTime;
pub use settings::{Rebalancing, Trigger};

#[cfg(test)]
mod tests;
