//! Load: tokens routed to each expert over a window of steps.

/// Tokens per layer and expert over a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadWindow {
    experts: usize,
    /// `[layers][experts]`
    counts: Vec<Vec<u64>>,
}
