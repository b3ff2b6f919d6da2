//! A text that must not be shown: neither in logs nor in error messages.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

/// An API key as the user wrote it.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Secret(text.to_owned()))
    }
}

/// One secret, or a list of them.
pub fn one_or_several<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<Secret>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a string or a list of strings")]
    enum Written {
        One(Secret),
        Several(Vec<Secret>),
    }
    Ok(Some(match Written::deserialize(deserializer)? {
        Written::One(secret) => vec![secret],
        Written::Several(secrets) => secrets,
    }))
}
