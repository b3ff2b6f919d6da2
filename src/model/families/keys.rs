//! Typed access to the keys of a config.json that notes every problem instead of stopping at the first. Keys nobody
//! asks for are allowed: the file belongs to others.

use std::cell::RefCell;

use serde_json::{Map, Value};

use crate::error::Problems;

/// The file all problems here are about.
pub(super) const FILE: &str = "config.json";

// Limits of sizes. They are far above every published model and low enough that any product of sizes that the
// engine forms (the bytes of a whole model among them) fits 64 bits.
/// Rows of the embedding.
pub(super) const MAX_VOCAB: usize = 1 << 24;
/// Width of the residual stream and of latents.
pub(super) const MAX_HIDDEN: usize = 1 << 17;
/// Width of anything else: an intermediate layer, all heads together.
pub(super) const MAX_WIDTH: usize = 1 << 20;
/// Experts per layer.
pub(super) const MAX_EXPERTS: usize = 1 << 12;
/// Decoder layers.
pub(super) const MAX_LAYERS: usize = 1 << 10;
/// Tokens of a sequence.
pub(super) const MAX_POSITIONS: usize = 1 << 31;

/// One JSON object of config.json. Each method takes the value transformers uses when the key is absent; a value
/// that cannot be used is noted as a problem and replaced by that default, so that reading goes on.
pub(super) struct Keys<'a> {
    map: &'a Map<String, Value>,
    /// Path to this object, with a trailing dot; empty at the root.
    prefix: String,
    problems: &'a RefCell<Problems>,
}

impl<'a> Keys<'a> {
    /// The root object.
    pub(super) fn new(map: &'a Map<String, Value>, problems: &'a RefCell<Problems>) -> Self {
        Keys { map, prefix: String::new(), problems }
    }

    /// Notes a problem with `key`.
    pub(super) fn problem(&self, key: &str, expected: impl Into<String>, found: impl Into<String>) {
        self.problems.borrow_mut().add(FILE, format!("{}{key}", self.prefix), expected, found);
    }

    /// Notes a problem with `key` unless `ok`.
    pub(super) fn require(&self, ok: bool, key: &str, expected: impl Into<String>, found: impl ToString) {
        if !ok {
            self.problem(key, expected, found.to_string());
        }
    }

    /// The value of a key that is there and not null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The key is there and not null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// The key is there, null or not.
    pub(super) fn mentions(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The key is there and null.
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// `key`, or `alias` where only that is there.
    pub(super) fn either(&self, key: &'static str, alias: &'static str) -> &'static str {
        if !self.has(key) && self.has(alias) { alias } else { key }
    }

    /// Converts a value that is there; notes a problem when `convert` refuses it.
    fn read<T>(&self, key: &str, expected: &str, convert: impl FnOnce(&'a Value) -> Option<T>) -> Option<T> {
        let value = self.get(key)?;
        let converted = convert(value);
        if converted.is_none() {
            self.problem(key, expected, brief(value));
        }
        converted
    }

    /// An integer in `min..=max`; absent or null is the default.
    fn integer(&self, key: &str, default: usize, min: usize, max: usize) -> usize {
        let expected = format!("an integer from {min} to {max}");
        let convert = |value: &Value| {
            let n = usize::try_from(value.as_u64()?).ok()?;
            (min..=max).contains(&n).then_some(n)
        };
        self.read(key, &expected, convert).unwrap_or(default)
    }

    /// An integer in `1..=max`; absent or null is the default.
    pub(super) fn size(&self, key: &str, default: usize, max: usize) -> usize {
        self.integer(key, default, 1, max)
    }

    /// An integer in `0..=max`; absent or null is the default.
    pub(super) fn count(&self, key: &str, default: usize, max: usize) -> usize {
        self.integer(key, default, 0, max)
    }

    /// An integer in `1..=max`; absent is the default, null is `None`.
    pub(super) fn optional_size(&self, key: &str, default: Option<usize>, max: usize) -> Option<usize> {
        match self.map.get(key) {
            None => default,
            Some(Value::Null) => None,
            Some(_) => Some(self.size(key, 1, max)),
        }
    }

    /// A boolean; absent or null is the default.
    pub(super) fn flag(&self, key: &str, default: bool) -> bool {
        self.read(key, "true or false", Value::as_bool).unwrap_or(default)
    }

    /// A number that f32 can hold.
    pub(super) fn optional_number(&self, key: &str) -> Option<f64> {
        self.read(key, "a finite number", finite)
    }

    /// A number that f32 can hold; absent or null is the default.
    pub(super) fn number(&self, key: &str, default: f64) -> f64 {
        self.optional_number(key).unwrap_or(default)
    }

    /// A number above 0 that f32 can hold; absent or null is the default.
    pub(super) fn positive(&self, key: &str, default: f64) -> f64 {
        self.optional_positive(key).unwrap_or(default)
    }

    /// A number above 0 that f32 can hold.
    pub(super) fn optional_positive(&self, key: &str) -> Option<f64> {
        self.read(key, "a finite number above 0", |value| finite(value).filter(|&x| x as f32 > 0.0))
    }

    /// A string.
    pub(super) fn text(&self, key: &str) -> Option<&'a str> {
        self.read(key, "a string", Value::as_str)
    }

    /// A nested object.
    pub(super) fn object(&self, key: &str) -> Option<Keys<'a>> {
        let map = self.read(key, "an object", Value::as_object)?;
        Some(Keys { map, prefix: format!("{}{key}.", self.prefix), problems: self.problems })
    }

    /// A nested object with at least one key: transformers takes an empty one for none.
    pub(super) fn filled_object(&self, key: &str) -> Option<Keys<'a>> {
        self.object(key).filter(|object| !object.map.is_empty())
    }

    /// A list of integers in `0..=max`; absent or null is empty.
    pub(super) fn integers(&self, key: &str, max: usize) -> Vec<usize> {
        let expected = format!("a list of integers from 0 to {max}");
        let item = |value: &Value| usize::try_from(value.as_u64()?).ok().filter(|&n| n <= max);
        self.list(key, &expected, item).unwrap_or_default()
    }

    /// A list of numbers above 0 that f32 can hold.
    pub(super) fn positives(&self, key: &str) -> Option<Vec<f64>> {
        let item = |value: &Value| finite(value).filter(|&x| x as f32 > 0.0);
        self.list(key, "a list of finite numbers above 0", item)
    }

    /// A list of strings.
    pub(super) fn texts(&self, key: &str) -> Option<Vec<&'a str>> {
        self.list(key, "a list of strings", Value::as_str)
    }

    fn list<T>(&self, key: &str, expected: &str, item: impl Fn(&'a Value) -> Option<T>) -> Option<Vec<T>> {
        self.read(key, expected, |value| value.as_array()?.iter().map(item).collect())
    }

    /// Token ids given as one integer or a list; absent is the default, null is none.
    pub(super) fn token_ids(&self, key: &str, default: Option<u32>) -> Vec<u32> {
        if !self.mentions(key) {
            return Vec::from_iter(default);
        }
        let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
        let convert = |value: &Value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        self.read(key, "a token id or a list of token ids", convert).unwrap_or_default()
    }

    /// Refuses every string but `value`; absent or null stands for it.
    pub(super) fn only_text(&self, key: &str, value: &str) {
        if let Some(found) = self.text(key) {
            self.require(found == value, key, value, found);
        }
    }

    /// Refuses every boolean but `value`; absent or null stands for it.
    pub(super) fn only_flag(&self, key: &str, value: bool) {
        let found = self.flag(key, value);
        self.require(found == value, key, value.to_string(), found);
    }

    /// Refuses a key that would change the model in a way the engine does not compute.
    pub(super) fn absent(&self, key: &str) {
        if let Some(value) = self.get(key) {
            self.problem(key, "no such key (this variant of the family is not known)", brief(value));
        }
    }
}

/// A number that is finite in f32 too: that is what the engine computes in.
fn finite(value: &Value) -> Option<f64> {
    value.as_f64().filter(|&x| (x as f32).is_finite())
}

/// A JSON value as an error shows it.
pub(super) fn brief(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
