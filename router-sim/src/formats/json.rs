//! Loads as JSON: nested lists `[steps?][layers][experts]`, alone or under a key of an object.
//!
//! ```json
//! {"layer_ids": [3, 4], "load": [[5, 0, 2], [1, 1, 5]]}
//! ```
//! Also SGLang's `{"logical_count": ...}`, and `{"layer_3": {"activations": [...]}, ...}` as written by expert pruning
//! scripts.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::Write;
use std::path::Path;

use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::matrix::in_cell;
use super::memory::Collected;
use super::number::Number;
use super::source::{Output, read_whole};
use super::{Options, in_file};
use crate::Result;
use crate::stream::LoadStream;

/// Deepest nesting: steps, layers, experts.
const MAX_DEPTH: usize = 3;

/// Reads a file.
///
/// # Errors
/// [`crate::Error::Io`], [`crate::Error::File`].
pub fn read(path: &Path, options: &Options) -> Result<Collected> {
    let text = read_whole(path, options.progress.clone())?;
    let loads: Loads = serde_json::from_slice(&text).map_err(|e| in_file(path, e.to_string()))?;
    loads.collect(path, options).map_err(|why| in_file(path, why))
}

/// What a file says.
struct Loads {
    layer_ids: Option<Vec<usize>>,
    numbers: Nested,
}

/// Nested lists of equal lengths, flat.
#[derive(Default)]
struct Nested {
    /// Lengths, outermost first.
    shape: Vec<usize>,
    numbers: Vec<Number>,
}

impl Loads {
    fn collect(self, path: &Path, options: &Options) -> Result<Collected, String> {
        let (layers, experts) = match self.numbers.shape[..] {
            [layers, experts] | [_, layers, experts] => (layers, experts),
            _ => {
                return Err(format!(
                    "lists of shape {:?} are no loads [steps?, layers, experts]",
                    self.numbers.shape
                ));
            }
        };
        let layer_ids = self.layer_ids.unwrap_or_else(|| options.layer_ids(layers));
        if layer_ids.len() != layers {
            return Err(format!("{} layer_ids for {layers} layers", layer_ids.len()));
        }
        let (mut windows, mut errors) = (VecDeque::new(), VecDeque::new());
        for (step, numbers) in self.numbers.numbers.chunks((layers * experts).max(1)).enumerate() {
            let tokens = |(cell, number): (usize, &Number)| {
                number.tokens(options.scale).map_err(|why| in_cell(cell / experts, cell % experts, &why))
            };
            match numbers.iter().enumerate().map(tokens).collect() {
                Ok(window) => windows.push_back((step as u64, window)),
                Err(why) => errors.push_back((step as u64, why)),
            }
        }
        Collected::new(path, layer_ids, experts, windows, errors, options)
    }
}

impl Nested {
    /// Takes a list one level down; all of one level must be of one shape.
    fn push(&mut self, inner: Nested) -> Result<(), String> {
        if let Some(shape) = self.shape.get(1..)
            && self.shape[0] > 0
            && *shape != inner.shape[..]
        {
            return Err(format!("a list of shape {:?} among lists of shape {shape:?}", inner.shape));
        }
        if self.shape[0] == 0 {
            self.shape.truncate(1);
            self.shape.extend(&inner.shape);
            if self.shape.len() > MAX_DEPTH {
                return Err(format!("lists are nested deeper than {MAX_DEPTH}"));
            }
        }
        self.shape[0] += 1;
        self.numbers.extend(inner.numbers);
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Nested {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NestedVisitor)
    }
}

struct NestedVisitor;

impl<'de> Visitor<'de> for NestedVisitor {
    type Value = Nested;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nested lists of numbers of tokens")
    }

    fn visit_u64<E>(self, n: u64) -> Result<Nested, E> {
        Ok(Nested { shape: Vec::new(), numbers: vec![Number::Int(i128::from(n))] })
    }

    fn visit_i64<E>(self, n: i64) -> Result<Nested, E> {
        Ok(Nested { shape: Vec::new(), numbers: vec![Number::Int(i128::from(n))] })
    }

    fn visit_f64<E>(self, x: f64) -> Result<Nested, E> {
        Ok(Nested { shape: Vec::new(), numbers: vec![Number::Float(x)] })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Nested, A::Error> {
        let mut list = Nested { shape: vec![0], numbers: Vec::new() };
        while let Some(inner) = seq.next_element::<Nested>()? {
            list.push(inner).map_err(de::Error::custom)?;
        }
        Ok(list)
    }
}

/// One layer of a pruning script's file.
#[derive(Deserialize)]
struct Layer {
    activations: Nested,
}

impl<'de> Deserialize<'de> for Loads {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LoadsVisitor)
    }
}

struct LoadsVisitor;

impl<'de> Visitor<'de> for LoadsVisitor {
    type Value = Loads;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("lists of loads, or an object that holds them")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Loads, A::Error> {
        Ok(Loads { layer_ids: None, numbers: NestedVisitor.visit_seq(seq)? })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Loads, A::Error> {
        let (mut layer_ids, mut numbers, mut layers) = (None, None, BTreeMap::new());
        while let Some(key) = map.next_key::<String>()? {
            let layer = key.strip_prefix("layer_").and_then(|id| id.parse::<usize>().ok());
            match (key.as_str(), layer) {
                ("layer_ids", _) => layer_ids = Some(map.next_value()?),
                ("load" | "logical_count", _) => numbers = Some(map.next_value()?),
                // What SGLang's recorder writes beside the counts.
                ("rank" | "average_utilization_rate_over_window", _) => drop(map.next_value::<IgnoredAny>()?),
                (_, Some(id)) => drop(layers.insert(id, map.next_value::<Layer>()?)),
                _ => {
                    return Err(de::Error::custom(format!(
                        "key {key:?} is unknown, expected load, logical_count, layer_ids or layer_N"
                    )));
                }
            }
        }
        if let Some(numbers) = numbers {
            return Ok(Loads { layer_ids, numbers });
        }
        let mut numbers = Nested { shape: vec![0], numbers: Vec::new() };
        layer_ids = Some(layers.keys().copied().collect());
        for layer in layers.into_values() {
            numbers.push(layer.activations).map_err(de::Error::custom)?;
        }
        Ok(Loads { layer_ids, numbers })
    }
}

/// Writes `{"layer_ids": [...], "load": [[[...]]]}`, a line per layer.
///
/// # Errors
/// Those of the stream, [`crate::Error::Io`].
pub fn write(path: &Path, loads: &mut dyn LoadStream) -> Result<u64> {
    let mut output = Output::create(path)?;
    let mut window = loads.empty_window();
    let mut windows = 0;
    let put = |output: &mut Output, text: String| -> Result<()> {
        output.write_all(text.as_bytes()).map_err(|e| output.error(e))
    };
    put(&mut output, format!("{{\"layer_ids\": {:?},\n \"load\": [", window.layer_ids()))?;
    while loads.next_window(&mut window)? {
        let layers: Vec<String> = (0..window.layers())
            .map(|layer| format!("{:?}", window.totals(layer).collect::<Vec<_>>()))
            .collect();
        let separator = if windows == 0 { "" } else { "," };
        put(&mut output, format!("{separator}\n  [{}]", layers.join(",\n   ")))?;
        windows += 1;
    }
    put(&mut output, "]}\n".to_owned())?;
    output.finish_with(windows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::Options;
    use crate::load::Phase;
    use crate::stream::windows::WindowReader;

    fn loads(text: &str) -> Result<Vec<Vec<u64>>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("load.json");
        std::fs::write(&path, text).unwrap();
        let mut reader = read(&path, &Options::default())?;
        let (mut window, mut windows) = (reader.empty_window(), Vec::new());
        while reader.next_window(&mut window).map_err(|why| in_file(&path, why))? {
            let layers = (0..window.layers()).flat_map(|layer| window.counts(Phase::Prefill, layer).to_vec());
            windows.push(layers.collect());
        }
        Ok(windows)
    }

    #[test]
    fn all_forms() {
        assert_eq!(loads("[[1, 2], [3, 4]]").unwrap(), [[1, 2, 3, 4]]);
        assert_eq!(loads("[[[1, 2]], [[3.0, 4]]]").unwrap(), [[1, 2], [3, 4]]);
        assert_eq!(loads(r#"{"logical_count": [[[1, 2]]], "rank": 0}"#).unwrap(), [[1, 2]]);
        let pruner = r#"{"layer_4": {"scores": [0.5], "activations": [7]}, "layer_3": {"activations": [9]}}"#;
        assert_eq!(loads(pruner).unwrap(), [[9, 7]]);
    }

    #[test]
    fn refusals() {
        for (text, expected) in [
            ("[[1, 2], [3]]", "a list of shape [1] among lists of shape [2]"),
            ("[[1, -2]]", "MoE layer 0, expert 1: -2 tokens are negative"),
            ("[[1, 0.5]]", "no whole number"),
            ("[[1, NaN]]", "line 1"),
            ("[[1, null]]", "null"),
            ("[1, 2]", "lists of shape [2] are no loads"),
            ("[[[[1]]]]", "nested deeper than 3"),
            ("[]", "lists of shape [0]"),
            ("[[], []]", "2 layers x 0 experts"),
            ("{}", "lists of shape [0]"),
            (r#"{"loda": [[1]]}"#, "key \"loda\" is unknown"),
            (r#"{"layer_ids": [1], "load": [[1], [2]]}"#, "1 layer_ids for 2 layers"),
            (r#"{"layer_ids": [2, 1], "load": [[1], [2]]}"#, "1 follows 2"),
        ] {
            let message = loads(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
        let deep = "[".repeat(100_000);
        assert!(loads(&deep).unwrap_err().to_string().contains("recursion"));
    }
}
