//! What is asked of an engine or a server: prompts, lengths and arrival times, all drawn from a seed.

use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result};

/// Words of one token in most vocabularies, for servers that want text.
const WORDS: &[&str] = &[
    "the", "of", "and", "to", "in", "is", "that", "for", "was", "on", "are", "with", "as", "his", "they",
    "at", "be", "this", "from", "have", "or", "by", "one", "had", "not", "but", "what", "all", "were",
    "when", "we", "there", "can", "an", "your", "which", "their", "said", "if", "do", "will", "each",
    "about", "how", "up", "out", "them", "then", "she", "many", "some", "so", "these", "would", "other",
    "into", "has", "more", "her", "two", "like", "him", "see", "time",
];

/// Numbers out of a seed; the same everywhere.
pub(super) struct Random(ChaCha8Rng);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Random(ChaCha8Rng::seed_from_u64(seed))
    }

    /// In `0..n`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        // Multiply and shift (Lemire): the bias is below 2^-32 for any length or vocabulary.
        ((self.0.next_u64() >> 32) as usize * n) >> 32
    }

    /// In (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.0.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Tokens below `vocab_size`.
    pub(super) fn tokens(&mut self, count: usize, vocab_size: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(vocab_size) as u32).collect()
    }

    /// Common words, about a token each.
    pub(super) fn text(&mut self, words: usize) -> String {
        (0..words).map(|_| WORDS[self.below(WORDS.len())]).collect::<Vec<_>>().join(" ")
    }
}

/// A length in tokens, drawn evenly from `mean * (1 - spread)` to `mean * (1 + spread)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Length {
    mean: usize,
    /// In [0, 1].
    spread: f64,
}

impl Length {
    /// # Errors
    /// [`Error::Config`] naming `flag` for no tokens at all or a spread outside [0, 1].
    pub(super) fn new(flag: &str, mean: usize, spread: f64) -> Result<Self> {
        const MOST: usize = 1 << 24;
        if !(1..=MOST).contains(&mean) {
            return Err(Error::config(flag, format!("expected 1 to {MOST} tokens, found {mean}")));
        }
        if !(0.0..=1.0).contains(&spread) {
            return Err(Error::config(format!("{flag} spread"), format!("expected 0 to 1, found {spread}")));
        }
        Ok(Length { mean, spread })
    }

    pub(super) fn draw(&self, random: &mut Random) -> usize {
        let half = (self.mean as f64 * self.spread).round() as usize;
        (self.mean - half + random.below(2 * half + 1)).max(1)
    }
}

/// When each of `count` requests is sent, from the start: as a Poisson process of `rate` per second, or all at once
/// without a rate.
pub(super) fn arrivals(count: usize, rate: Option<f64>, random: &mut Random) -> Vec<Duration> {
    let mut now = 0.0;
    let mut next = || match rate {
        None => 0.0,
        Some(rate) => {
            let sent = now;
            now += -random.unit().ln() / rate;
            sent
        }
    };
    (0..count).map(|_| Duration::from_secs_f64(next())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_work() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            (random.tokens(5, 1000), random.text(3), arrivals(4, Some(2.0), &mut random))
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert!(Random::new(3).tokens(1000, 7).iter().all(|&id| id < 7));
        assert_eq!(Random::new(3).text(9).split(' ').count(), 9);
    }

    #[test]
    fn lengths_stay_within_their_spread_and_reach_both_ends() {
        let mut random = Random::new(1);
        let length = Length::new("--input-len", 10, 0.2).unwrap();
        let drawn: Vec<usize> = (0..500).map(|_| length.draw(&mut random)).collect();
        assert_eq!((drawn.iter().min(), drawn.iter().max()), (Some(&8), Some(&12)));
        assert_eq!(Length::new("", 10, 0.0).unwrap().draw(&mut random), 10);
        assert!((0..100).all(|_| Length::new("", 1, 1.0).unwrap().draw(&mut random) >= 1));
        let refused = |mean, spread| Length::new("--input-len", mean, spread).unwrap_err().to_string();
        assert_eq!(refused(0, 0.0), "--input-len: expected 1 to 16777216 tokens, found 0");
        assert_eq!(refused(1, 1.5), "--input-len spread: expected 0 to 1, found 1.5");
        assert!(refused(1, f64::NAN).contains("NaN"));
    }

    #[test]
    fn arrivals_follow_the_rate() {
        let mut random = Random::new(5);
        assert_eq!(arrivals(3, None, &mut random), [Duration::ZERO; 3]);
        let times = arrivals(2001, Some(10.0), &mut random);
        assert!(times.is_sorted() && times[0] == Duration::ZERO);
        // 2000 gaps of 0.1 s: the mean of an exponential is within 10 % with all but no doubt.
        let mean = times[2000].as_secs_f64() / 2000.0;
        assert!((mean - 0.1).abs() < 0.01, "{mean}");
    }
}
