//! How long a step may take before its ranks count as hung. Pure: callers bring the durations.
//!
//! A fixed limit either cuts off honest work or notices nothing: one step of a large model on a small machine takes
//! minutes, one of a small model milliseconds. So a step is compared with what steps have taken here: by their size, the
//! slowest of late; rows are never slower together than apart, which bounds sizes not seen yet. A step may take
//! [`SLACK`] times that and `--step-timeout` on top. The first steps, with nothing to compare to, have [`UNKNOWN`].

use std::time::Duration;

/// How much slower than any of late an honest step may be: longer contexts, other work on the machine.
const SLACK: u32 = 4;
/// The limit before any step has ended.
const UNKNOWN: Duration = Duration::from_secs(600);
/// Steps are told apart by the bits their number of rows has.
const SIZES: usize = 32;

/// Judges the duration of steps.
#[derive(Debug)]
pub(super) struct Watchdog {
    /// `--step-timeout`.
    timeout: Duration,
    /// For 1, 2 to 3, 4 to 7 ... rows: the slowest step of late.
    slowest: [Option<Duration>; SIZES],
}

impl Watchdog {
    /// Knows nothing yet.
    pub fn new(timeout: Duration) -> Self {
        Watchdog { timeout, slowest: [None; SIZES] }
    }

    /// A step of `rows` rows took so long. Slower steps count at once, faster ones little by little.
    pub fn note(&mut self, rows: usize, duration: Duration) {
        let slowest = &mut self.slowest[size(rows)];
        *slowest = Some(slowest.map_or(duration, |slowest| duration.max(slowest - slowest / 64)));
    }

    /// How long a step of `rows` rows may take.
    pub fn allowance(&self, rows: usize) -> Duration {
        let expected = self.slowest.iter().enumerate().filter_map(|(seen, duration)| {
            // So many steps of the smallest of the size seen make one of this.
            let pieces = rows.div_ceil(1 << seen);
            Some(duration.as_ref()?.saturating_mul(u32::try_from(pieces).unwrap_or(u32::MAX)))
        });
        expected.min().map_or(UNKNOWN, |expected| expected.saturating_mul(SLACK).saturating_add(self.timeout))
    }
}

fn size(rows: usize) -> usize {
    (rows.max(1).ilog2() as usize).min(SIZES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn steps_are_compared_with_their_like() {
        let mut watchdog = Watchdog::new(10 * SECOND);
        assert_eq!(watchdog.allowance(1), UNKNOWN);
        watchdog.note(1, SECOND / 10);
        assert_eq!(watchdog.allowance(1), 10 * SECOND + SECOND * 4 / 10);
        // 512 rows, unseen: as if one after another.
        assert_eq!(watchdog.allowance(512), 10 * SECOND + SECOND * 4 * 512 / 10);
        // Seen once, they are known better; and fewer rows are no slower.
        watchdog.note(512, 2 * SECOND);
        assert_eq!(watchdog.allowance(512), 18 * SECOND);
        assert_eq!(watchdog.allowance(300), 18 * SECOND);
        assert_eq!(watchdog.allowance(600), 26 * SECOND);
        assert_eq!(watchdog.allowance(1), 10 * SECOND + SECOND * 4 / 10);
    }

    #[test]
    fn slow_steps_are_remembered_for_a_while() {
        let mut watchdog = Watchdog::new(SECOND);
        watchdog.note(4, 30 * SECOND);
        watchdog.note(4, SECOND);
        assert!(watchdog.allowance(8) > 200 * SECOND);
        for _ in 0..1000 {
            watchdog.note(4, SECOND);
        }
        assert_eq!(watchdog.allowance(8), SECOND + 4 * 2 * SECOND);
        watchdog.note(usize::MAX, Duration::MAX / 2);
        assert!(watchdog.allowance(usize::MAX) > SECOND);
    }
}
