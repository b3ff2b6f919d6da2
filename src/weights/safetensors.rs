//! The header of one safetensors file: an 8-byte little-endian length, then JSON that maps each tensor's name to
//! `{"dtype", "shape", "data_offsets"}`, then the data without gaps (github.com/huggingface/safetensors, "Format").
//!
//! The `safetensors` crate gives the element types and is the oracle of the tests; parsing is done here because a
//! refused file must name every fault with tensor, expected and found, duplicate names included, and must not make
//! memory grow with what a hostile header claims.

use crate::error::Problems;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::value::{Error as PlainError, StrDeserializer};
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

/// Bytes of the length before the header.
const LENGTH_BYTES: usize = 8;
/// Headers this long are refused, as the reference implementation does.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;
/// Most tensors in a file, well above what the largest published models have in all their shards together; with
/// [`MAX_NAME_BYTES`] it bounds the memory that a header can ask for.
const MAX_TENSORS: usize = 400_000;
/// Longest name of a tensor.
const MAX_NAME_BYTES: usize = 1024;
/// How much of a strange string a message shows.
const SHOWN_CHARS: usize = 40;

/// One tensor of a file, checked: `bytes` lies in the file and fits the shape and type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions; empty for a scalar.
    pub shape: Vec<usize>,
    /// Where it lies, from the start of the file.
    pub bytes: Range<usize>,
}

/// What a header holds.
#[derive(Debug, Default)]
pub struct Header {
    /// Sound tensors, by offset.
    pub entries: Vec<Entry>,
    /// Names of tensors that are there but refused; the problems say why.
    pub refused: Vec<String>,
}

/// Reads the header of `file`. Notes every problem; `None` when the header itself cannot be read, so that nothing is
/// known about the tensors. Touches only the header's bytes.
pub fn read_header(file: &str, bytes: &[u8], problems: &mut Problems) -> Option<Header> {
    let json = header_bytes(file, bytes, problems)?;
    let data_start = LENGTH_BYTES + json.len();
    let parsed = std::str::from_utf8(json)
        .map_err(|error| format!("bytes that are not UTF-8: {error}"))
        .and_then(|text| serde_json::from_str(text).map_err(|error| error.to_string()));
    let raw: UniqueMap<RawEntry<'_>> = match parsed {
        Ok(raw) => raw,
        Err(found) => {
            problems.add(
                file,
                None,
                format!("a JSON header of tensor entries in bytes 8..{data_start}"),
                found,
            );
            return None;
        }
    };
    let mut check =
        Check { file, data_start, data_len: bytes.len() - data_start, problems, out: Header::default() };
    check.run(raw);
    Some(check.out)
}

/// The JSON part, once the length before it is believable.
fn header_bytes<'a>(file: &str, bytes: &'a [u8], problems: &mut Problems) -> Option<&'a [u8]> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        let found = format!("a file of {} bytes, cut at offset {}", bytes.len(), bytes.len());
        problems.add(file, None, "8 bytes of header length at offset 0", found);
        return None;
    };
    let length = u64::from_le_bytes(*length);
    if length >= MAX_HEADER_BYTES {
        let expected = format!("a header length below {MAX_HEADER_BYTES} bytes at offset 0");
        problems.add(file, None, expected, format!("{length}"));
        return None;
    }
    // Below the limit above, so it fits usize.
    let length = length as usize;
    if length > rest.len() {
        let expected =
            format!("a header of {length} bytes at offset 8, so a file of at least {} bytes", 8 + length);
        let found = format!("a file of {} bytes, cut inside the header", bytes.len());
        problems.add(file, None, expected, found);
        return None;
    }
    Some(&rest[..length])
}

/// A tensor entry as written.
#[derive(Deserialize)]
struct RawEntry<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    #[serde(deserialize_with = "dimensions")]
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// An entry whose shape, type and offsets agree with each other; offsets count from the start of the data.
struct Placed {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    start: u64,
    end: u64,
}

struct Check<'a> {
    file: &'a str,
    data_start: usize,
    data_len: usize,
    problems: &'a mut Problems,
    out: Header,
}

impl Check<'_> {
    fn run(&mut self, raw: UniqueMap<RawEntry<'_>>) {
        for name in raw.duplicates {
            self.problem(&name, "one entry of this name in the header", "two or more");
            self.out.refused.push(name);
        }
        let mut placed = Vec::with_capacity(raw.entries.len());
        for (name, entry) in raw.entries {
            match entry.place(&name) {
                Ok(entry) => placed.push(entry),
                Err((expected, found)) => {
                    self.problem(&name, expected, found);
                    self.out.refused.push(name);
                }
            }
        }
        placed.sort_by_key(|entry| (entry.start, entry.end));
        self.truncation(&placed);
        self.coverage(&placed);
        // Where a name came twice, both entries count for the coverage above, and neither is used.
        let repeated: HashSet<String> = self.out.refused.iter().cloned().collect();
        for entry in placed {
            match (usize::try_from(entry.start), usize::try_from(entry.end)) {
                (Ok(start), Ok(end)) if end <= self.data_len && !repeated.contains(&entry.name) => {
                    let bytes = self.data_start + start..self.data_start + end;
                    self.out.entries.push(Entry {
                        name: entry.name,
                        dtype: entry.dtype,
                        shape: entry.shape,
                        bytes,
                    });
                }
                _ => self.out.refused.push(entry.name),
            }
        }
    }

    /// One problem for all tensors that reach beyond the end of the file.
    fn truncation(&mut self, placed: &[Placed]) {
        let beyond: Vec<&Placed> = placed.iter().filter(|e| e.end > self.data_len as u64).collect();
        let Some(first) = beyond.first() else { return };
        let file_len = self.data_start + self.data_len;
        let at = |offset: u64| self.data_start as u128 + u128::from(offset);
        let last = beyond.iter().map(|e| e.end).max().unwrap_or(0);
        let expected = format!(
            "bytes {}..{} of a file of {} bytes (header and all tensors)",
            at(first.start),
            at(first.end),
            at(last)
        );
        let mut found = format!("a file of {file_len} bytes");
        if beyond.len() > 1 {
            let names: Vec<&str> = beyond[1..].iter().map(|e| e.name.as_str()).collect();
            found += &format!("; also beyond its end: {}", super::collapse::collapse(&names).join(", "));
        }
        self.problem(&first.name, expected, found);
    }

    /// The data must be covered without gap or overlap.
    fn coverage(&mut self, placed: &[Placed]) {
        let mut end = 0u64;
        let mut before = "the header";
        for entry in placed {
            if entry.start != end {
                let kind = if entry.start < end { "overlap" } else { "gap" };
                let expected = format!("data_offsets to start at {end}, where {before} ends");
                let found = format!(
                    "{}..{}: {} {kind} of {} bytes",
                    entry.start,
                    entry.end,
                    if kind == "overlap" { "an" } else { "a" },
                    entry.start.abs_diff(end)
                );
                self.problem(&entry.name, expected, found);
            }
            if entry.end >= end {
                end = entry.end;
                before = &entry.name;
            }
        }
        if end < self.data_len as u64 {
            let expected = format!("a file of {} bytes, where {before} ends", self.data_start as u64 + end);
            let found = format!("{} bytes", self.data_start + self.data_len);
            self.problems.add(self.file, None, expected, found);
        }
    }

    fn problem(&mut self, tensor: &str, expected: impl Into<String>, found: impl Into<String>) {
        self.problems.add(self.file, tensor.to_owned(), expected, found);
    }
}

impl RawEntry<'_> {
    /// Checks type, shape and offsets against each other; `Err` is (expected, found).
    fn place(self, name: &str) -> Result<Placed, (String, String)> {
        let [start, end] = self.data_offsets;
        let dtype = Dtype::deserialize(StrDeserializer::<PlainError>::new(&self.dtype)).map_err(|_| {
            let found: String = self.dtype.chars().take(SHOWN_CHARS).collect();
            ("a dtype of the safetensors format".to_owned(), format!("{found:?}"))
        })?;
        let offsets = || format!("data_offsets {start}..{end}");
        if end < start {
            return Err(("data_offsets in ascending order".to_owned(), offsets()));
        }
        let bits = self.shape.iter().try_fold(dtype.bitsize() as u64, |bits, &dim| bits.checked_mul(dim));
        let shape: Option<Vec<usize>> = self.shape.iter().map(|&d| usize::try_from(d).ok()).collect();
        let (Some(bits), Some(shape)) = (bits, shape) else {
            let found = format!("{dtype} {:?}, whose size overflows", self.shape);
            return Err(("a shape whose size in bits fits 64 bits".to_owned(), found));
        };
        if bits % 8 != 0 {
            return Err(("a whole number of bytes".to_owned(), format!("{bits} bits for {dtype} {shape:?}")));
        }
        if bits / 8 != end - start {
            let expected = format!("{} bytes for {dtype} {shape:?}", bits / 8);
            return Err((expected, format!("{} ({} bytes)", offsets(), end - start)));
        }
        Ok(Placed { name: name.to_owned(), dtype, shape, start, end })
    }
}

/// A list of at most [`MAX_DIMENSIONS`] sizes.
fn dimensions<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct Dimensions;
    impl<'de> Visitor<'de> for Dimensions {
        type Value = Vec<u64>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a shape of at most {MAX_DIMENSIONS} dimensions")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
            let mut dims = Vec::new();
            while let Some(dim) = seq.next_element()? {
                if dims.len() == MAX_DIMENSIONS {
                    return Err(A::Error::invalid_length(MAX_DIMENSIONS + 1, &self));
                }
                dims.push(dim);
            }
            Ok(dims)
        }
    }
    deserializer.deserialize_seq(Dimensions)
}

/// A JSON object that remembers which names came more than once; `__metadata__` is skipped. Also reads the index.
pub struct UniqueMap<T> {
    /// All values in file order, those of repeated names too.
    pub entries: Vec<(String, T)>,
    /// Names that came more than once, each listed once.
    pub duplicates: Vec<String>,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueVisitor(PhantomData))
    }
}

/// A name, not copied before its length is known.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

struct UniqueVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for UniqueVisitor<T> {
    type Value = UniqueMap<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with at most {MAX_TENSORS} tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueMap<T>, A::Error> {
        let mut out = UniqueMap { entries: Vec::new(), duplicates: Vec::new() };
        let mut seen = HashSet::new();
        let mut repeated = HashSet::new();
        while let Some(Key(name)) = map.next_key::<Key<'de>>()? {
            if name.len() > MAX_NAME_BYTES {
                let start: String = name.chars().take(SHOWN_CHARS).collect();
                let message = format!(
                    "{start:?}...: expected a name of at most {MAX_NAME_BYTES} bytes, found {}",
                    name.len()
                );
                return Err(A::Error::custom(message));
            }
            let name = name.into_owned();
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if out.entries.len() == MAX_TENSORS {
                return Err(A::Error::invalid_length(MAX_TENSORS + 1, &self));
            }
            let value = map.next_value_seed(Named(&name, PhantomData))?;
            if !seen.insert(name.clone()) && repeated.insert(name.clone()) {
                out.duplicates.push(name.clone());
            }
            out.entries.push((name, value));
        }
        Ok(out)
    }
}

/// Reads a value and puts its tensor's name before any error.
struct Named<'n, T>(&'n str, PhantomData<T>);

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Named<'_, T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        T::deserialize(deserializer)
            .map_err(|error| D::Error::custom(format!("tensor {:?}: {error}", self.0)))
    }
}

#[cfg(test)]
mod tests;
