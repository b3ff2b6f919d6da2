//! Recognises a format by the first bytes of a file and by its name.

use std::io::BufRead;
use std::path::Path;

use super::number::Number;
use super::source::{self, Source};
use super::{Format, array, in_file, moetrace, npy, npz, zip};
use crate::{Error, Result};

/// Records that are looked at where the shape alone does not tell.
const SAMPLE_RECORDS: usize = 64;
/// Longest last axis that could be the choices of a token.
const MAX_TOP_K: usize = 16;

/// What the file is. Nothing is taken from `source`.
pub fn format(path: &Path, source: &mut Source) -> Result<Format> {
    let start = source.fill_buf().map_err(|e| Error::Io { path: path.into(), source: e })?;
    if start.is_empty() {
        return Err(Error::Record { path: path.into(), record: 0, why: "the file is empty".into() });
    }
    if start.starts_with(b"MOEROUTE") {
        return Ok(Format::Trace);
    }
    if start.starts_with(moetrace::MAGIC) {
        return Ok(Format::Moetrace);
    }
    if start.starts_with(npy::MAGIC) {
        let again = Box::new(source::open(path, None)?);
        let array = npy::read(again).map_err(|why| in_file(path, why))?;
        return Ok(if holds_routed(array) { Format::RoutedNpy } else { Format::LoadNpy });
    }
    if start.starts_with(zip::MAGIC) {
        return Ok(if npz::holds_routed(path)? { Format::RoutedNpz } else { Format::LoadNpz });
    }
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    let known: Vec<&str> = Format::ALL.iter().map(|format| format.name()).collect();
    Err(in_file(
        path,
        format!(
            "neither its first bytes nor its extension {extension:?} are known; say what it is with --input-format, one of {}",
            known.join(", ")
        ),
    ))
}

/// Expert ids or counts? Both have three axes. The choices of a token are few, small, and all different; the counts of
/// a layer sum up to tokens x top-k, the same in every layer.
fn holds_routed(mut array: array::ArrayReader) -> bool {
    let [_, layers, last] = array.shape[..] else { return false };
    if array.layout.element.is_float() || last > MAX_TOP_K || last == 0 {
        return false;
    }
    let mut same_sums = layers > 1;
    for _ in 0..SAMPLE_RECORDS {
        let Ok(Some(numbers)) = array.next_record() else { break };
        let values: Vec<i128> = numbers
            .map(|number| match number {
                Number::Int(n) => n,
                Number::Float(_) => -1,
            })
            .collect();
        let mut layers = values.chunks_exact(last);
        let distinct = |ids: &[i128]| ids.iter().enumerate().all(|(i, id)| !ids[..i].contains(id));
        if !layers.clone().all(|ids| distinct(ids) && ids.iter().all(|id| (0..1 << 16).contains(id))) {
            return false;
        }
        let sum = |ids: &[i128]| ids.iter().sum::<i128>();
        let first = layers.next().map(sum);
        same_sums &= layers.all(|ids| Some(sum(ids)) == first);
    }
    !same_sums
}
