//! Waiting for what other threads and processes do.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::time::{Duration, Instant};

/// Nothing in these tests takes as long; a hang becomes a failure.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Waits until `condition` holds, and fails when it never does.
#[track_caller]
pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
