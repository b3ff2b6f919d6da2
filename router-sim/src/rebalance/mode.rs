//! When experts may move, as flags and traces say it.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use crate::{Error, Result};

/// When a run rebalances.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Mode {
    /// Never by itself.
    #[default]
    Off,
    /// When it is expected to pay.
    Auto,
    /// Every so many steps, at least 1, wherever a plan is better than what is there.
    Every(u64),
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mode::Off => f.write_str("off"),
            Mode::Auto => f.write_str("auto"),
            Mode::Every(steps) => write!(f, "every={steps}"),
        }
    }
}

impl TryFrom<String> for Mode {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = || Error::Impossible(format!("{text:?} is not one of off, auto, every=STEPS"));
        match text {
            "off" => Ok(Mode::Off),
            "auto" => Ok(Mode::Auto),
            _ => match text.strip_prefix("every=").ok_or_else(refuse)?.parse() {
                Ok(0) => Err(Error::Impossible("every=0: at least 1 step".into())),
                Ok(steps) => Ok(Mode::Every(steps)),
                Err(_) => Err(refuse()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_written_as_they_are_read() {
        for mode in [Mode::Off, Mode::Auto, Mode::Every(1), Mode::Every(u64::MAX)] {
            assert_eq!(mode.to_string().parse::<Mode>().unwrap(), mode);
        }
        for wrong in ["", "on", "every", "every=", "every=-1", "every=1.5", "every=x", "Auto"] {
            let error = wrong.parse::<Mode>().unwrap_err().to_string();
            assert_eq!(error, format!("{wrong:?} is not one of off, auto, every=STEPS"));
        }
        assert!("every=0".parse::<Mode>().unwrap_err().to_string().contains("at least 1 step"));
    }
}
