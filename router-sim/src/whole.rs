//! Integers as JSON has them: 573.0 and 573e0 are 573, as they are to JSON Schema and to writers that know floats only.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, Unexpected, Visitor};

/// Floats from here on stand for integers beyond `i64` as well.
const BEYOND: f64 = 9_223_372_036_854_775_808.0;

/// An integer, however it is written; a number with a fraction is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Whole<T>(pub T);

impl<'de, T: TryFrom<i64>> Deserialize<'de> for Whole<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Take<T>(PhantomData<T>);
        impl<T: TryFrom<i64>> Visitor<'_> for Take<T> {
            type Value = Whole<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer in range")
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Whole<T>, E> {
                T::try_from(value).map(Whole).map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Whole<T>, E> {
                match i64::try_from(value) {
                    Ok(value) => self.visit_i64(value),
                    Err(_) => Err(E::invalid_value(Unexpected::Unsigned(value), &self)),
                }
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Whole<T>, E> {
                if value.fract() == 0.0 && value.abs() < BEYOND {
                    return self.visit_i64(value as i64);
                }
                Err(E::invalid_type(Unexpected::Float(value), &self))
            }
        }
        deserializer.deserialize_any(Take(PhantomData))
    }
}

/// For a field that may be absent.
pub(crate) fn field<'de, T: TryFrom<i64>, D: Deserializer<'de>>(from: D) -> Result<Option<T>, D::Error> {
    Ok(Option::deserialize(from)?.map(|Whole(value)| value))
}

/// For a list that may be absent.
pub(crate) fn list<'de, T: TryFrom<i64>, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<T>>, D::Error> {
    Ok(Option::deserialize(from)?.map(plain))
}

/// For lists of lists.
pub(crate) fn lists<'de, T: TryFrom<i64>, D: Deserializer<'de>>(from: D) -> Result<Vec<Vec<T>>, D::Error> {
    Ok(Vec::deserialize(from)?.into_iter().map(plain).collect())
}

fn plain<T>(list: Vec<Whole<T>>) -> Vec<T> {
    list.into_iter().map(|Whole(value)| value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T: TryFrom<i64>>(text: &str) -> Result<T, String> {
        serde_json::from_str(text).map(|Whole(value)| value).map_err(|error| error.to_string())
    }

    #[test]
    fn integers_are_taken_however_they_are_written() {
        for text in ["3", "3.0", "3e0", "0.3e1", "30E-1"] {
            assert_eq!(read::<u32>(text), Ok(3), "{text}");
        }
        assert_eq!(read::<u32>("-0.0"), Ok(0));
        assert_eq!(read::<i32>("-1.0"), Ok(-1));
        assert_eq!(read::<i64>("-9223372036854775808"), Ok(i64::MIN));
        assert_eq!(read::<i64>("5e17"), Ok(500_000_000_000_000_000));
        assert!(
            read::<i64>("-9223372036854775809").is_err(),
            "a reader of JSON makes it the float of the lowest one"
        );
        for (text, why) in [
            ("1.5", "floating point `1.5`, expected an integer in range"),
            ("-1", "integer `-1`"),
            ("4294967296.0", "4294967296"),
            ("1e300", "1e+300"),
            ("9223372036854775808.0", "floating point"),
            ("18446744073709551615", "18446744073709551615"),
            ("\"3\"", "string \"3\""),
            ("true", "boolean"),
            ("null", "null"),
        ] {
            let error = read::<u32>(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
