//! How a run rebalances.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use super::Mode;
use crate::placement::PolicyName;
use crate::{Error, Result};

/// What a look leads to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Trigger {
    /// A plan, every time.
    Interval,
    /// A plan when the window's balancedness is below `below`. After a decision it must have been above `rearm` once
    /// before the next one, so that a load that cannot be balanced does not replan for ever.
    Balance {
        /// Mean over layers.
        below: f64,
        /// At least `below`.
        rearm: f64,
    },
    /// A plan whenever the patience allows, carried out where it pays.
    Payoff,
}

/// When to look, what at, and what leads to a migration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rebalancing {
    /// Steps between two looks at the load.
    pub interval: u64,
    /// Steps that are looked at.
    pub window: u64,
    /// Parts that the window is planned on.
    pub parts: usize,
    /// What a look leads to.
    pub trigger: Trigger,
    /// Least part of a layer's predicted cost that its plan must save to be carried out.
    pub min_gain: f64,
    /// Experts that may move per layer; `None` without limit.
    pub max_transfers: Option<usize>,
}

impl Default for Rebalancing {
    fn default() -> Self {
        Rebalancing {
            interval: 1000,
            window: 1000,
            parts: 4,
            trigger: Trigger::Interval,
            min_gain: 0.01,
            max_transfers: None,
        }
    }
}

/// Transfers per layer and migration of policies that can keep to a limit: few bring most of the gain.
const LIVE_TRANSFERS: usize = 8;

/// Keys of a trace's header.
mod key {
    pub const MODE: &str = "rebalance";
    pub const POLICY: &str = "rebalance-policy";
    pub const INTERVAL: &str = "rebalance-interval";
    pub const WINDOW: &str = "rebalance-window";
    pub const PARTS: &str = "rebalance-parts";
    pub const MIN_GAIN: &str = "rebalance-min-gain";
    pub const MAX_TRANSFERS: &str = "rebalance-max-transfers";
}

impl Rebalancing {
    /// What a mode stands for; `None` for off. Auto looks at the end of every part of the window.
    pub fn of_mode(mode: Mode, window: u64, policy: PolicyName) -> Option<Self> {
        let parts = window.min(4) as usize;
        let max_transfers = matches!(policy, PolicyName::Moeyard { .. }).then_some(LIVE_TRANSFERS);
        let settings = Rebalancing { window, parts, max_transfers, ..Rebalancing::default() };
        match mode {
            Mode::Off => None,
            Mode::Auto => {
                Some(Rebalancing { interval: settings.part_steps(), trigger: Trigger::Payoff, ..settings })
            }
            Mode::Every(interval) => Some(Rebalancing { interval, ..settings }),
        }
    }

    /// Steps of one part of the window.
    pub fn part_steps(&self) -> u64 {
        self.window.div_ceil(self.parts as u64)
    }

    /// Checks every limit.
    ///
    /// # Errors
    /// [`Error::Impossible`] with name, limit and value.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: &str, value: String, limit: &str| {
            Err(Error::Impossible(format!("rebalancing: {what} {value} must be {limit}")))
        };
        if self.interval == 0 || self.window == 0 {
            let least = self.interval.min(self.window).to_string();
            return refuse("interval and window", least, "at least 1 step");
        }
        if self.parts == 0 || self.parts as u64 > self.window {
            return refuse(
                "window parts",
                self.parts.to_string(),
                &format!("within 1..={} steps", self.window),
            );
        }
        if !(0.0..1.0).contains(&self.min_gain) {
            return refuse("min gain", self.min_gain.to_string(), "at least 0 and below 1");
        }
        if let Trigger::Balance { below, rearm } = self.trigger {
            if !(0.0..=1.0).contains(&below) {
                return refuse("below", below.to_string(), "within 0..=1");
            }
            if !(below..=1.0).contains(&rearm) {
                return refuse("rearm", rearm.to_string(), &format!("within {below}..=1"));
            }
        }
        Ok(())
    }

    /// The entries of a trace's header that say how the run rebalances; see [`Rebalancing::from_header`].
    pub fn to_header(mode: Mode, policy: PolicyName, settings: Option<&Self>) -> BTreeMap<String, String> {
        let mut header = BTreeMap::from([(key::MODE.to_owned(), mode.to_string())]);
        if let Some(settings) = settings {
            let mut put = |key: &str, value: String| header.insert(key.to_owned(), value);
            put(key::POLICY, policy.name().to_owned());
            put(key::INTERVAL, settings.interval.to_string());
            put(key::WINDOW, settings.window.to_string());
            put(key::PARTS, settings.parts.to_string());
            put(key::MIN_GAIN, settings.min_gain.to_string());
            if let Some(limit) = settings.max_transfers {
                put(key::MAX_TRANSFERS, limit.to_string());
            }
        }
        header
    }

    /// How the run of a trace rebalanced; `None` when it did not.
    ///
    /// # Errors
    /// [`Error::Impossible`] naming the entry that is missing or senseless.
    pub fn from_header(header: &BTreeMap<String, String>) -> Result<Option<(PolicyName, Self)>> {
        let mode = match header.get(key::MODE) {
            None => Mode::Off,
            Some(text) => text.parse()?,
        };
        if mode == Mode::Off {
            return Ok(None);
        }
        let policy: String = entry(header, key::POLICY)?;
        let max_transfers = match header.contains_key(key::MAX_TRANSFERS) {
            true => Some(entry(header, key::MAX_TRANSFERS)?),
            false => None,
        };
        let settings = Rebalancing {
            interval: entry(header, key::INTERVAL)?,
            window: entry(header, key::WINDOW)?,
            parts: entry(header, key::PARTS)?,
            trigger: if mode == Mode::Auto { Trigger::Payoff } else { Trigger::Interval },
            min_gain: entry(header, key::MIN_GAIN)?,
            max_transfers,
        };
        settings.check()?;
        Ok(Some((PolicyName::parse(&policy, 1, 1)?, settings)))
    }
}

fn entry<T: FromStr<Err: Display>>(header: &BTreeMap<String, String>, key: &str) -> Result<T> {
    let refuse = |why: String| Error::Impossible(format!("the trace's header entry {key}: {why}"));
    let text = header.get(key).ok_or_else(|| refuse("missing".into()))?;
    text.parse().map_err(|e: T::Err| refuse(format!("{text:?}: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn senseless_settings_are_refused() {
        let good = Rebalancing::default();
        good.check().unwrap();
        for (settings, expected) in [
            (Rebalancing { interval: 0, ..good }, "interval and window 0 must be at least 1 step"),
            (Rebalancing { parts: 0, ..good }, "window parts 0 must be within 1..=1000 steps"),
            (Rebalancing { parts: 1001, ..good }, "window parts 1001"),
            (Rebalancing { min_gain: f64::NAN, ..good }, "min gain NaN"),
            (
                Rebalancing { trigger: Trigger::Balance { below: 1.1, rearm: 1.2 }, ..good },
                "below 1.1 must be within 0..=1",
            ),
            (
                Rebalancing { trigger: Trigger::Balance { below: 0.5, rearm: 0.4 }, ..good },
                "rearm 0.4 must be within 0.5..=1",
            ),
        ] {
            let message = settings.check().unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
    }

    #[test]
    fn a_header_says_how_the_run_rebalanced() {
        for policy in [PolicyName::BEST, PolicyName::Eplb] {
            for (mode, window) in [(Mode::Auto, 256), (Mode::Auto, 1), (Mode::Every(7), 100), (Mode::Off, 9)]
            {
                let settings = Rebalancing::of_mode(mode, window, policy);
                settings.iter().for_each(|settings| settings.check().unwrap());
                let header = Rebalancing::to_header(mode, policy, settings.as_ref());
                let read = Rebalancing::from_header(&header).unwrap();
                assert_eq!(read, settings.map(|settings| (policy, settings)));
            }
        }
        assert_eq!(Rebalancing::from_header(&BTreeMap::new()).unwrap(), None);
        let auto = Rebalancing::of_mode(Mode::Auto, 10, PolicyName::BEST);
        let header = Rebalancing::to_header(Mode::Auto, PolicyName::BEST, auto.as_ref());
        for (key, value, expected) in [
            ("rebalance", "sometimes", "not one of off, auto"),
            ("rebalance-policy", "best", "\"best\" is not one of"),
            ("rebalance-window", "-1", "entry rebalance-window: \"-1\""),
            ("rebalance-window", "2", "window parts 4"),
        ] {
            let mut wrong = header.clone();
            wrong.insert(key.to_owned(), value.to_owned());
            let error = Rebalancing::from_header(&wrong).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} should contain {expected:?}");
        }
        let mut short = header;
        short.remove("rebalance-interval");
        let error = Rebalancing::from_header(&short).unwrap_err().to_string();
        assert!(error.contains("rebalance-interval: missing"), "{error}");
    }
}
