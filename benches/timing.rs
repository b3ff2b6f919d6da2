//! Repeats work for a while.

use std::time::{Duration, Instant};

/// How long, at least.
const PATIENCE: Duration = Duration::from_secs(2);

/// Best and median of the microseconds that `work` takes; at least five times.
pub fn micros(mut work: impl FnMut()) -> (f64, f64) {
    let mut taken = Vec::new();
    let begin = Instant::now();
    while taken.len() < 5 || begin.elapsed() < PATIENCE {
        let start = Instant::now();
        work();
        taken.push(start.elapsed().as_secs_f64() * 1e6);
    }
    taken.sort_by(f64::total_cmp);
    (taken[0], taken[taken.len() / 2])
}
