//! How much of a migration fits between two steps. Pure: callers bring the durations.
//!
//! Without a bandwidth of its own a migration takes [`SHARE`] of the time of short steps: what it adds to the time between
//! two tokens is that share, whatever the model and the machine. How long bytes take is measured on the way.

use std::time::Duration;

/// Time for weights over the time of a short step.
const SHARE: f64 = 0.1;
/// A slice between two steps that nobody waits for. A request that comes meanwhile waits so long.
const IDLE: Duration = Duration::from_millis(2);
/// Bytes per second before any were measured.
const FIRST_RATE: f64 = 500e6;
/// Smaller slices would take longer to agree upon than to copy.
const LEAST_BYTES: u64 = 64 << 10;

/// Measures steps and slices, and sizes the next slice.
#[derive(Debug)]
pub(super) struct Pace {
    /// `--rebalance-bandwidth`.
    bandwidth: Option<u64>,
    most_bytes: u64,
    /// Bytes per second of slices of late.
    rate: f64,
    /// Duration of the shorter steps of late.
    short_step: Option<Duration>,
    /// When the bandwidth allows the next slice.
    due: Duration,
}

impl Pace {
    /// Knows nothing yet. No slice will be larger than `most_bytes`.
    pub fn new(bandwidth: Option<u64>, most_bytes: u64) -> Self {
        Pace { bandwidth, most_bytes, rate: FIRST_RATE, short_step: None, due: Duration::ZERO }
    }

    /// A step took so long, without waiting for a slice. Shorter steps count at once, longer ones little by little.
    pub fn note_step(&mut self, took: Duration) {
        self.short_step = Some(self.short_step.map_or(took, |short| took.min(short + short / 16)));
    }

    /// A slice of so many bytes per rank took so long.
    pub fn note_slice(&mut self, bytes: u64, took: Duration) {
        let rate = bytes as f64 / took.as_secs_f64().max(1e-6);
        self.rate += (rate - self.rate) / 8.0;
    }

    /// Bytes per second of slices of late.
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// How long from `now` until the next slice; time counts from any fixed moment.
    pub fn pause(&self, now: Duration) -> Duration {
        self.due.saturating_sub(now)
    }

    /// Bytes of a slice at `now`, of `left` there are; 0 when none is due. `idle` when no step waits for it.
    pub fn bytes(&mut self, now: Duration, left: u64, idle: bool) -> u64 {
        if left == 0 || !self.pause(now).is_zero() {
            return 0;
        }
        let time = match self.short_step {
            Some(step) if !idle => step.mul_f64(SHARE),
            _ => IDLE,
        };
        let most = (self.rate * time.as_secs_f64()) as u64;
        let bytes = most.clamp(LEAST_BYTES.min(self.most_bytes), self.most_bytes).min(left);
        if let Some(bandwidth) = self.bandwidth {
            self.due = now + Duration::from_secs_f64(bytes as f64 / bandwidth.max(1) as f64);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn slices_take_a_share_of_short_steps() {
        let mut pace = Pace::new(None, 8 << 20);
        assert_eq!(pace.bytes(MS, u64::MAX, false), 1_000_000, "2 ms at the first rate");
        // 1 GB/s, measured often enough.
        (0..100).for_each(|_| pace.note_slice(1_000_000, MS));
        pace.note_step(10 * MS);
        let near = |bytes: u64, expected: u64| bytes.abs_diff(expected) < expected / 100;
        assert!(near(pace.bytes(MS, u64::MAX, false), 1_000_000));
        // A long prompt step does not make the slices before decode steps longer.
        pace.note_step(500 * MS);
        assert!(near(pace.bytes(MS, u64::MAX, false), 1_062_500));
        assert!(near(pace.bytes(MS, u64::MAX, true), 2_000_000));
        assert_eq!((pace.bytes(MS, 5, false), pace.bytes(MS, 0, true)), (5, 0));
        pace.note_step(MS / 1000);
        assert_eq!(pace.bytes(MS, u64::MAX, false), LEAST_BYTES);
        pace.note_step(MS);
        (0..1000).for_each(|_| pace.note_step(1000 * MS));
        assert_eq!(pace.bytes(MS, u64::MAX, false), 8 << 20);
    }

    #[test]
    fn a_bandwidth_is_kept_over_time() {
        let mut pace = Pace::new(Some(1_000_000), 100_000);
        let (mut now, mut sent) = (Duration::ZERO, 0);
        while now < 1000 * MS {
            sent += pace.bytes(now, u64::MAX, true);
            now += MS;
        }
        assert!((950_000..=1_100_000).contains(&sent), "{sent} bytes in a second");
        assert!(pace.pause(now) <= 100 * MS);
    }
}
