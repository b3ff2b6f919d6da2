//! What a client wants to know of the expert load: the query of `GET /v1/experts`.

use super::super::error::ApiError;
use super::{DEFAULT_WINDOW_S, MAX_WINDOW_S, SPACING_S};
use crate::metrics::Phase;

/// See each field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Asked {
    /// Seconds of the past.
    pub window_s: u64,
    /// How it is written.
    pub format: Format,
    /// Which counts; JSON only.
    pub phases: Phases,
    /// With the ranks that hold each expert; JSON only.
    pub owners: bool,
}

/// See [`Asked::format`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    Csv,
}

/// See [`Asked::phases`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phases {
    /// Prefill and decode, each for itself.
    Apart,
    /// Their sum.
    Both,
    Only(Phase),
}

impl Default for Asked {
    fn default() -> Self {
        Asked { window_s: DEFAULT_WINDOW_S, format: Format::Json, phases: Phases::Apart, owners: true }
    }
}

impl Asked {
    /// Reads a query; every parameter is known, given once and allowed with the others.
    pub fn parse(query: &str) -> Result<Asked, ApiError> {
        let mut asked = Asked::default();
        let mut seen = Vec::new();
        for (key, value) in pairs(query) {
            if seen.contains(&key) {
                return Err(ApiError::bad_param(clip(key), format!("\"{}\" is given twice.", clip(key))));
            }
            seen.push(key);
            match key {
                "window" => asked.window_s = window(value)?,
                "format" => {
                    asked.format = one_of(key, value, &[("json", Format::Json), ("csv", Format::Csv)])?
                }
                "phase" => {
                    let [prefill, decode] = Phase::ALL.map(|phase| (phase.label(), Phases::Only(phase)));
                    asked.phases = one_of(key, value, &[("both", Phases::Both), prefill, decode])?;
                }
                "owners" => asked.owners = one_of(key, value, &[("true", true), ("false", false)])?,
                other => {
                    let why = format!(
                        "There is no parameter \"{}\"; known are window, format, phase and owners.",
                        clip(other)
                    );
                    return Err(ApiError::bad_param(clip(other), why));
                }
            }
        }
        if asked.format == Format::Csv
            && let Some(param) = seen.iter().find(|key| ["phase", "owners"].contains(key))
        {
            let why = format!("{param} goes with format=json; a CSV has both phases and the owners.");
            return Err(ApiError::bad_param(*param, why));
        }
        Ok(asked)
    }
}

/// Keys and values of a query.
pub(super) fn pairs(query: &str) -> impl Iterator<Item = (&str, &str)> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

/// The choice that `value` names.
pub(super) fn one_of<T: Copy>(key: &str, value: &str, choices: &[(&str, T)]) -> Result<T, ApiError> {
    choices.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        let why = format!("{key} is \"{}\", but must be {}.", clip(value), names.join(" or "));
        ApiError::bad_param(key, why)
    })
}

/// Seconds out of "90s", "5m" or "90".
fn window(text: &str) -> Result<u64, ApiError> {
    let (number, unit) = match text.strip_suffix('m') {
        Some(minutes) => (minutes, 60),
        None => (text.strip_suffix('s').unwrap_or(text), 1),
    };
    let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let seconds = digits.then(|| number.parse::<u64>().ok()?.checked_mul(unit)).flatten();
    seconds.filter(|seconds| (SPACING_S..=MAX_WINDOW_S).contains(seconds)).ok_or_else(|| {
        let given = clip(text);
        let why = format!(
            "window is \"{given}\", but must be {SPACING_S}s to {MAX_WINDOW_S}s, such as 60s or 5m: older counts are not kept."
        );
        ApiError::bad_param("window", why)
    })
}

/// As much of a client's text as an answer repeats.
pub(super) fn clip(text: &str) -> String {
    text.chars().take(50).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read_and_refused_by_name() {
        let of = |query: &str| Asked::parse(query);
        assert_eq!(of(""), Ok(Asked::default()));
        let csv = Asked { window_s: 300, format: Format::Csv, ..Asked::default() };
        assert_eq!(of("window=5m&format=csv"), Ok(csv));
        assert_eq!(of("window=7"), Ok(Asked { window_s: 7, ..Asked::default() }));
        let page = Asked { phases: Phases::Only(Phase::Decode), owners: false, ..Asked::default() };
        assert_eq!(of("phase=decode&owners=false"), Ok(page));
        for (query, param) in [
            ("window=", "window"),
            ("window=4s", "window"),
            ("window=301s", "window"),
            ("window=-60s", "window"),
            ("window=6m", "window"),
            ("window=99999999999999999999m", "window"),
            ("window=1e2", "window"),
            ("format=npy", "format"),
            ("format", "format"),
            ("phase=all", "phase"),
            ("owners=no", "owners"),
            ("format=csv&phase=both", "phase"),
            ("owners=false&format=csv", "owners"),
            ("since=3", "since"),
            ("window=60s&window=5s", "window"),
        ] {
            let error = of(query).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{query}");
        }
        assert!(of("window=301s").unwrap_err().message.contains("5s to 300s"));
    }
}
