//! Amounts of memory as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

/// Bytes, written as `4GiB`, `512 MB`, `1.5g` or a plain number. KB, MB, GB and TB are powers of 1000; KiB, MiB, GiB
/// and TiB powers of 1024, and so are the bare letters k, m, g and t.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("expected bytes such as 4GiB, 512MB or 1073741824, found {text:?}");
        let text = text.trim();
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit: f64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kib" => 1024.0,
            "m" | "mib" => 1024f64.powi(2),
            "g" | "gib" => 1024f64.powi(3),
            "t" | "tib" => 1024f64.powi(4),
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "tb" => 1e12,
            _ => return Err(refuse()),
        };
        let number: f64 = number.parse().map_err(|_| refuse())?;
        let bytes = number * unit;
        // Beyond 2^63 the sums of the memory plan could overflow.
        if bytes < 9e18 { Ok(ByteSize(bytes as u64)) } else { Err(refuse()) }
    }
}

impl fmt::Display for ByteSize {
    /// In the largest binary unit that leaves at least 1, with one decimal: "4.0 GiB".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        let mut units = ["B", "KiB", "MiB", "GiB", "TiB"].iter();
        let mut unit = units.next().expect("five units");
        for larger in units {
            // What would be shown as 1024.0 is 1.0 of the next unit.
            if value < 1023.95 {
                break;
            }
            (value, unit) = (value / 1024.0, larger);
        }
        if *unit == "B" { write!(f, "{} B", self.0) } else { write!(f, "{value:.1} {unit}") }
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "bytes as a number or a text such as \"4GiB\"")]
        enum Written {
            Number(u64),
            Text(String),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Number(bytes) => bytes.to_string(),
            Written::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("1073741824", 1 << 30),
            ("4GiB", 4 << 30),
            ("4 gib", 4 << 30),
            ("1.5g", 3 << 29),
            ("512MB", 512_000_000),
            ("2k", 2048),
            ("7b", 7),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1", "4 gigs", "1e9", "1.2.3", "99999999TiB", "nan", "inf"] {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert!(error.contains("expected bytes such as 4GiB"), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_are_shown() {
        for (bytes, text) in [
            (0, "0 B"),
            (1000, "1000 B"),
            (1024, "1.0 KiB"),
            (3 << 29, "1.5 GiB"),
            ((1 << 30) - 1, "1.0 GiB"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }
}
