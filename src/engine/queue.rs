//! What waits to be admitted for the first time: how much there may be, and how fast it gets less. Pure: callers bring the
//! durations.

use super::options::EngineOptions;
use crate::error::{Error, QueueLimit, Result};
use std::time::Duration;

/// What is older than this counts half as much for the pace.
const HALF_LIFE_S: f64 = 20.0;
/// Clients are asked to wait at least and at most this long.
const RETRY_S: (f64, f64) = (1.0, 60.0);

/// Requests between their submission and their first admission.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// How many.
    requests: usize,
    /// Their prompt tokens.
    tokens: usize,
    /// Requests admitted while others waited, and how long that took; older ones fade.
    admitted: f64,
    seconds: f64,
}

impl Queue {
    /// Requests that wait.
    pub fn requests(&self) -> usize {
        self.requests
    }

    /// Takes places for `requests` with `tokens` prompt tokens in all, or for none of them. An empty queue takes any
    /// number of tokens: what fits the engine can run.
    ///
    /// # Errors
    /// [`Error::Request`] for more requests than the queue could ever hold, [`Error::Busy`] when it is too full now.
    pub fn enter(&mut self, requests: usize, tokens: usize, options: &EngineOptions) -> Result<()> {
        let (most, most_tokens) = (options.max_waiting, options.max_waiting_tokens);
        if requests > most {
            let message = format!(
                "the request has {requests} sequences (prompts times n), but no more than {most} may wait at a time"
            );
            return Err(Error::request("n", message));
        }
        let (limit, message) = if self.requests + requests > most {
            let waiting = self.requests;
            let message =
                format!("{waiting} requests are waiting, and with {requests} more they would exceed {most}");
            (QueueLimit::Requests, message)
        } else if self.requests > 0 && self.tokens.saturating_add(tokens) > most_tokens {
            let waiting = self.tokens;
            let message = format!(
                "{waiting} prompt tokens are waiting, and with {tokens} more they would exceed {most_tokens}"
            );
            (QueueLimit::Tokens, message)
        } else {
            self.requests += requests;
            self.tokens += tokens;
            return Ok(());
        };
        Err(Error::Busy { limit, message, retry_after_s: self.retry_after_s() })
    }

    /// One request was admitted, or left.
    pub fn leave(&mut self, tokens: usize) {
        assert!(
            self.requests > 0 && self.tokens >= tokens,
            "{tokens} tokens leave a queue of {}",
            self.tokens
        );
        self.requests -= 1;
        self.tokens -= tokens;
    }

    /// In a time in which requests waited, this many were admitted.
    pub fn note_pace(&mut self, admitted: usize, elapsed: Duration) {
        let fade = 0.5f64.powf(elapsed.as_secs_f64() / HALF_LIFE_S);
        self.admitted = self.admitted * fade + admitted as f64;
        self.seconds = self.seconds * fade + elapsed.as_secs_f64();
    }

    /// When those that wait now will have been admitted, at the pace of late.
    fn retry_after_s(&self) -> u32 {
        let (least, most) = RETRY_S;
        // Nobody admitted in all that time: longer than can be said.
        let seconds =
            if self.seconds == 0.0 { least } else { self.requests as f64 * self.seconds / self.admitted };
        seconds.clamp(least, most).ceil() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::options::tests::options;

    fn busy(queue: &mut Queue, requests: usize, tokens: usize) -> u32 {
        let options = EngineOptions { max_waiting: 4, max_waiting_tokens: 100, ..options() };
        match queue.enter(requests, tokens, &options) {
            Ok(()) => 0,
            Err(Error::Busy { retry_after_s, .. }) => retry_after_s,
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn requests_and_tokens_are_bounded_as_a_whole() {
        let mut queue = Queue::default();
        assert_eq!(busy(&mut queue, 1, 1000), 0, "an empty queue takes any prompt");
        assert_eq!(busy(&mut queue, 1, 1), 1, "tokens");
        queue.leave(1000);
        assert_eq!(busy(&mut queue, 3, 60), 0);
        assert_eq!(busy(&mut queue, 2, 2), 1, "requests");
        assert_eq!(busy(&mut queue, 1, 40), 0);
        assert_eq!((queue.requests, queue.tokens), (4, 100), "what was refused took nothing");
        let options = EngineOptions { max_waiting: 4, ..options() };
        assert!(
            matches!(Queue::default().enter(5, 5, &options), Err(Error::Request { param: Some(p), .. }) if p == "n")
        );
    }

    #[test]
    fn the_time_to_retry_follows_the_pace() {
        let mut queue = Queue::default();
        assert_eq!(busy(&mut queue, 4, 4), 0);
        queue.note_pace(2, Duration::from_secs(10));
        assert_eq!(busy(&mut queue, 1, 1), 20, "5 s each");
        for _ in 0..1000 {
            queue.note_pace(1, Duration::from_secs(1));
        }
        let settled = busy(&mut queue, 1, 1);
        assert!((4..=5).contains(&settled), "{settled}");
        queue.note_pace(0, Duration::from_secs(3600));
        assert_eq!(busy(&mut queue, 1, 1), 60);
    }
}
