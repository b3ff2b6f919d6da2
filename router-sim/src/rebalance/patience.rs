//! How much a run trusts its predictions: longer rests after bad ones, longer horizons after good ones.

/// Longest rest, in windows.
const MOST_WINDOWS: u64 = 64;
/// Most that a horizon is stretched.
const MOST_TRUST: u64 = 8;
/// A migration that saves less than this part of what was predicted was a poor one.
const POOR: f64 = 0.5;
/// Failures in a row after which the time to the next try no longer doubles.
const MOST_DOUBLINGS: u32 = 6;

/// What experience has taught; part of every decision.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Patience {
    window: u64,
    interval: u64,
    /// Steps between the end of a migration and the next decision.
    rest: u64,
    /// The step at which the last migration was complete.
    moved_at: Option<u64>,
    /// Its promise has been compared with what came.
    judged: bool,
    trust: u64,
    failures: u32,
    retry_at: u64,
}

impl Patience {
    pub fn new(window: u64, interval: u64) -> Self {
        Patience {
            window,
            interval,
            rest: window,
            moved_at: None,
            judged: true,
            trust: 1,
            failures: 0,
            retry_at: 0,
        }
    }

    /// How often the time that load has lasted it is expected to last again.
    pub fn trust(&self) -> f64 {
        self.trust as f64
    }

    /// The first step that may decide after the rest, if there is one.
    pub fn rests_until(&self) -> Option<u64> {
        Some(self.moved_at?.saturating_add(self.rest))
    }

    /// Failures in a row and the first step that may try again.
    pub fn backs_off_until(&self) -> Option<(u32, u64)> {
        (self.failures > 0).then_some((self.failures, self.retry_at))
    }

    /// A migration is complete.
    pub fn moved(&mut self, step: u64) {
        (self.moved_at, self.judged, self.failures) = (Some(step), false, 0);
    }

    /// Experts moved on somebody else's word: there is no promise to judge.
    pub fn overruled(&mut self, step: u64) {
        (self.moved_at, self.judged) = (Some(step), true);
    }

    /// A migration was given up.
    pub fn failed(&mut self, step: u64) {
        self.failures = self.failures.saturating_add(1);
        let wait = self.interval.saturating_mul(1 << self.failures.min(MOST_DOUBLINGS));
        self.retry_at = step.saturating_add(wait);
    }

    /// Compares what the last migration kept of its promise, once, when it has rested.
    pub fn judge(&mut self, step: u64, kept: f64) {
        if self.judged || self.rests_until().is_none_or(|until| step < until) {
            return;
        }
        self.judged = true;
        if kept < POOR {
            self.rest = self.rest.saturating_mul(2).min(self.window.saturating_mul(MOST_WINDOWS));
            self.trust = 1;
        } else {
            self.rest = (self.rest / 2).max(self.window);
            self.trust = (self.trust * 2).min(MOST_TRUST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poor_migrations_rest_longer_and_good_ones_reach_further() {
        let mut patience = Patience::new(100, 25);
        assert_eq!((patience.rests_until(), patience.trust()), (None, 1.0));
        patience.moved(1000);
        assert_eq!(patience.rests_until(), Some(1100));
        patience.judge(1099, 0.0);
        assert_eq!(patience.rests_until(), Some(1100), "too early to tell");
        patience.judge(1100, 0.49);
        assert_eq!(patience.rests_until(), Some(1200));
        patience.judge(1200, 0.0);
        assert_eq!(patience.rests_until(), Some(1200), "judged once");
        for doubled in [400, 800, 1600, 3200, 6400, 6400] {
            patience.moved(0);
            patience.judge(u64::MAX, -1.0);
            assert_eq!(patience.rests_until(), Some(doubled));
        }
        for (trust, rest) in
            [(2.0, 3200), (4.0, 1600), (8.0, 800), (8.0, 400), (8.0, 200), (8.0, 100), (8.0, 100)]
        {
            patience.moved(0);
            patience.judge(u64::MAX, 0.5);
            assert_eq!((patience.trust(), patience.rests_until()), (trust, Some(rest)));
        }
        patience.overruled(7);
        patience.judge(u64::MAX, 0.0);
        assert_eq!((patience.trust(), patience.rests_until()), (8.0, Some(107)));
    }

    #[test]
    fn failures_back_off() {
        let mut patience = Patience::new(100, 25);
        assert_eq!(patience.backs_off_until(), None);
        let mut until = Vec::new();
        for _ in 0..8 {
            patience.failed(1000);
            until.push(patience.backs_off_until().unwrap());
        }
        let waits: Vec<u64> = until.iter().map(|(_, step)| step - 1000).collect();
        assert_eq!(waits, [50, 100, 200, 400, 800, 1600, 1600, 1600]);
        assert_eq!(until[7].0, 8);
        patience.moved(2000);
        assert_eq!(patience.backs_off_until(), None);
    }
}
