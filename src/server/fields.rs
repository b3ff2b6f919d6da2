//! A JSON object taken apart field by field, so that each refusal names its field and nothing is ignored by accident.
//!
//! Values stay raw text until a field is taken with its type: a body of the largest size allowed costs little more than
//! itself, whatever is nested in it.

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;

pub use router_sim::whole::Whole;

use super::error::{ApiError, clip};

/// Most fields of one object; no request has a quarter of that.
const MAX_FIELDS: usize = 128;

/// What is left of a JSON object.
#[derive(Debug)]
pub struct Fields<'a> {
    /// Goes before field names in messages: empty, or `"outer."`.
    prefix: String,
    entries: Vec<(String, &'a RawValue)>,
}

impl<'a> Fields<'a> {
    /// The fields of the object `body`; duplicates are refused.
    pub fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        let object: Object<'a> = serde_json::from_slice(body).map_err(|error| {
            ApiError::bad_request(format!(
                "The request body is no valid JSON object: {}",
                clip(&error.to_string())
            ))
        })?;
        Ok(Fields { prefix: String::new(), entries: object.entries })
    }

    /// The fields of the object `raw`, which stands at `path` of the body.
    pub fn nested(path: &str, raw: &'a str) -> Result<Self, ApiError> {
        let object: Object<'a> = typed(path, raw, "an object")?;
        Ok(Fields { prefix: format!("{path}."), entries: object.entries })
    }

    /// The value of `name` as it was written; `null` is the same as absent.
    pub fn raw(&mut self, name: &str) -> Option<&'a str> {
        let at = self.entries.iter().position(|(key, _)| key == name)?;
        let text = self.entries.swap_remove(at).1.get();
        (text != "null").then_some(text)
    }

    /// The value of `name`; `expected` says in words what it should be.
    pub fn take<T: Deserialize<'a>>(&mut self, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        self.raw(name).map(|raw| typed(&self.path(name), raw, expected)).transpose()
    }

    /// A truth value.
    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.take(name, "true or false")
    }

    /// An integer between `min` and `max`, both allowed.
    pub fn integer(&mut self, name: &str, min: i64, max: i64) -> Result<Option<i64>, ApiError> {
        let expected = if max == i64::MAX {
            format!("an integer of at least {min}")
        } else {
            format!("an integer between {min} and {max}")
        };
        match self.take::<Whole<i64>>(name, &expected)?.map(|Whole(value)| value) {
            Some(value) if value < min || value > max => Err(self.refused(name, &expected, value)),
            value => Ok(value),
        }
    }

    /// A number for which `allowed` holds.
    pub fn number(
        &mut self,
        name: &str,
        expected: &str,
        allowed: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ApiError> {
        match self.take::<f64>(name, expected)? {
            Some(value) if !value.is_finite() || !allowed(value) => Err(self.refused(name, expected, value)),
            value => Ok(value),
        }
    }

    /// A list of at most `limit` raw values.
    pub fn list(
        &mut self,
        name: &str,
        expected: &str,
        limit: usize,
    ) -> Result<Option<Vec<&'a RawValue>>, ApiError> {
        match self.take::<Vec<&'a RawValue>>(name, expected)? {
            Some(list) if list.len() > limit => {
                let path = self.path(name);
                let message = format!("`{path}` may have at most {limit} entries, got {}.", list.len());
                Err(ApiError::bad_param(path, message))
            }
            list => Ok(list),
        }
    }

    /// The fields of the object `name`.
    pub fn object(&mut self, name: &str) -> Result<Option<Fields<'a>>, ApiError> {
        let object = self.take::<Object<'a>>(name, "an object")?;
        Ok(object.map(|object| Fields { prefix: format!("{}.", self.path(name)), entries: object.entries }))
    }

    /// Refuses fields of `unsupported` unless they have the value that changes nothing.
    pub fn refuse(&mut self, unsupported: &[Unsupported]) -> Result<(), ApiError> {
        for field in unsupported {
            let Some(raw) = self.raw(field.name) else { continue };
            if !field.neutral.is(raw) {
                let path = self.path(field.name);
                let message =
                    format!("`{path}` is not supported yet: {}, got {}.", field.neutral.rule(), clip(raw));
                return Err(ApiError::bad_param(path, message));
            }
        }
        Ok(())
    }

    /// Refuses what is left: fields of `unsupported` as [`Self::refuse`] does, and all unknown ones.
    pub fn finish(mut self, unsupported: &[Unsupported]) -> Result<(), ApiError> {
        self.refuse(unsupported)?;
        match self.entries.first() {
            None => Ok(()),
            Some((name, _)) => {
                let path = self.path(&clip(name));
                let message = format!("Unknown field `{path}`.");
                Err(ApiError::bad_param(path, message))
            }
        }
    }

    /// Where `name` stands in the body, for messages.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The error for a value that is not what it should be.
    pub fn refused(&self, name: &str, expected: &str, value: impl std::fmt::Display) -> ApiError {
        let path = self.path(name);
        let message = format!("`{path}` must be {expected}, got {value}.");
        ApiError::bad_param(path, message)
    }
}

/// The value `raw` of the field `path`; `expected` says in words what it should be.
pub fn typed<'a, T: Deserialize<'a>>(path: &str, raw: &'a str, expected: &str) -> Result<T, ApiError> {
    serde_json::from_str(raw).map_err(|error| {
        let found = clip(&error.to_string());
        ApiError::bad_param(path, format!("`{path}` must be {expected}: {found}."))
    })
}

/// A field that clients of this protocol may send and that this server does not act on.
#[derive(Debug, Clone, Copy)]
pub struct Unsupported {
    /// Its name.
    pub name: &'static str,
    /// The value with which it may be sent all the same.
    pub neutral: Neutral,
}

/// A value that asks for nothing; `null` always does.
#[derive(Debug, Clone, Copy)]
pub enum Neutral {
    /// Only `null`.
    Null,
    /// This truth value.
    Bool(bool),
    /// This number.
    Number(f64),
    /// This string.
    Text(&'static str),
    /// An empty string, list or object.
    Empty,
}

impl Neutral {
    fn is(self, raw: &str) -> bool {
        match self {
            Neutral::Null => false,
            Neutral::Bool(value) => serde_json::from_str(raw).is_ok_and(|given: bool| given == value),
            Neutral::Number(value) => serde_json::from_str(raw).is_ok_and(|given: f64| given == value),
            Neutral::Text(text) => serde_json::from_str(raw).is_ok_and(|given: String| given == text),
            // By its text, which is valid JSON: parsing a large map would only cost memory.
            Neutral::Empty if raw.starts_with(['[', '{']) => raw[1..raw.len() - 1].trim().is_empty(),
            Neutral::Empty => raw == "\"\"",
        }
    }

    fn rule(self) -> String {
        match self {
            Neutral::Null => "it must be absent or null".into(),
            Neutral::Bool(value) => format!("it must be {value}"),
            Neutral::Number(value) => format!("it must be {value}"),
            Neutral::Text(text) => format!("it must be {text:?}"),
            Neutral::Empty => "it must be empty".into(),
        }
    }
}

/// Keys and raw values of a JSON object, in the order written.
struct Object<'a> {
    entries: Vec<(String, &'a RawValue)>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object<'de>, A::Error> {
                let mut entries: Vec<(String, &'de RawValue)> = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, &'de RawValue>()? {
                    if entries.iter().any(|(seen, _)| *seen == key) {
                        return Err(A::Error::custom(format_args!(
                            "the field `{}` occurs twice",
                            clip(&key)
                        )));
                    }
                    if entries.len() == MAX_FIELDS {
                        return Err(A::Error::custom(format_args!("more than {MAX_FIELDS} fields")));
                    }
                    entries.push((key, value));
                }
                Ok(Object { entries })
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields<'_> {
        Fields::parse(json.as_bytes()).expect(json)
    }

    #[test]
    fn bodies_that_are_no_object_are_refused() {
        let deep = "[".repeat(100_000);
        let nested = format!("{{\"a\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let many = format!("{{{}\"z\": 0}}", (0..200).map(|i| format!("\"f{i}\": 0, ")).collect::<String>());
        for (body, said) in [
            ("", "EOF"),
            ("{", "EOF"),
            ("[]", "an object"),
            ("\"x\"", "an object"),
            ("{\"a\": 1} x", "trailing"),
            ("{\"a\": NaN}", "expected value"),
            ("{\"a\": 1, \"a\": 2}", "`a` occurs twice"),
            (many.as_str(), "more than 128 fields"),
            (deep.as_str(), "an object"),
        ] {
            let error = Fields::parse(body.as_bytes()).unwrap_err();
            assert!(error.message.contains(said), "{}: {}", clip(body), error.message);
        }
        assert!(Fields::parse(b"{\"a\": \"\xff\"}").unwrap_err().message.contains("JSON"));
        // Depth is met only where a type is asked for.
        let error = fields(&nested).take::<serde_json::Value>("a", "shallow").unwrap_err();
        assert!(error.message.contains("recursion limit"), "{}", error.message);
    }

    #[test]
    fn a_refusal_names_field_limit_and_value() {
        let mut f = fields(r#"{"t": 3.5, "i": 0, "f": 1.5, "b": "yes", "big": 1e999, "o": {"x": 1}}"#);
        let message = |r: Result<Option<i64>, ApiError>| r.unwrap_err().message;
        assert_eq!(
            f.number("t", "between 0 and 2", |t| (0.0..=2.0).contains(&t)).unwrap_err().message,
            "`t` must be between 0 and 2, got 3.5."
        );
        assert_eq!(message(f.integer("i", 1, i64::MAX)), "`i` must be an integer of at least 1, got 0.");
        assert!(
            message(f.integer("f", 1, 4)).starts_with("`f` must be an integer between 1 and 4: invalid type")
        );
        assert!(f.boolean("b").unwrap_err().message.starts_with("`b` must be true or false: invalid type"));
        assert!(f.number("big", "finite", |_| true).unwrap_err().message.contains("out of range"));
        let mut inner = f.object("o").unwrap().unwrap();
        let error = inner.boolean("x").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("o.x"));
        f.finish(&[]).unwrap();
    }

    #[test]
    fn what_nobody_took_is_refused_by_name() {
        let table = &[
            Unsupported { name: "n", neutral: Neutral::Number(1.0) },
            Unsupported { name: "echo", neutral: Neutral::Bool(false) },
            Unsupported { name: "bias", neutral: Neutral::Empty },
            Unsupported { name: "guided", neutral: Neutral::Null },
        ];
        for json in [
            "{}",
            r#"{"n": 1, "echo": false, "bias": {}, "guided": null}"#,
            r#"{"n": 1.0, "bias": "", "unknown": null}"#,
            r#"{"bias": [ ]}"#,
        ] {
            let mut f = fields(json);
            f.raw("unknown");
            f.finish(table).expect(json);
        }
        for (json, param) in [
            (r#"{"n": 2}"#, "n"),
            (r#"{"echo": true}"#, "echo"),
            (r#"{"bias": {"1": 2}}"#, "bias"),
            (r#"{"bias": " "}"#, "bias"),
            (r#"{"bias": 0}"#, "bias"),
            (r#"{"guided": ""}"#, "guided"),
            (r#"{"surprise": 1}"#, "surprise"),
        ] {
            assert_eq!(fields(json).finish(table).unwrap_err().param.as_deref(), Some(param), "{json}");
        }
    }
}
