//! Recognises a format by the first bytes of a file and by its name.

use std::io::BufRead;
use std::path::Path;

use super::number::Number;
use super::{
    Format, array, in_file, jsonl, moetrace, npy, npz, route_lines, safetensors, source, trtllm, zip,
};
use crate::{Error, Result};

/// Records that are looked at where the shape alone does not tell.
const SAMPLE_RECORDS: usize = 64;
/// Longest last axis that could be the choices of a token.
const MAX_TOP_K: usize = 16;

/// What the file is. A pipe must be named by the caller: looking would take its first bytes away.
pub fn format(path: &Path) -> Result<Format> {
    if trtllm::is_statistics(path) {
        return Ok(Format::Trtllm);
    }
    let is_pipe = std::fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir());
    if is_pipe {
        return Err(in_file(path, "a pipe: say what comes through it with --input-format".into()));
    }
    let mut source = source::open(path, None)?;
    let start = source.fill_buf().map_err(|e| Error::Io { path: path.into(), source: e })?;
    if start.is_empty() {
        return Err(Error::Record { path: path.into(), record: 0, why: "the file is empty".into() });
    }
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    if let Some(format) = by_first_bytes(path, start)? {
        return Ok(format);
    }
    match extension {
        "csv" => Ok(Format::LoadCsv),
        "json" => Ok(Format::LoadJson),
        "jsonl" => Ok(Format::RouteJsonl),
        _ => {
            let known: Vec<&str> = Format::ALL.iter().map(|format| format.name()).collect();
            Err(in_file(
                path,
                format!(
                    "neither its first bytes nor its extension {extension:?} are known; say what it is with --input-format, one of {}",
                    known.join(", ")
                ),
            ))
        }
    }
}

fn by_first_bytes(path: &Path, start: &[u8]) -> Result<Option<Format>> {
    if start.starts_with(b"MOEROUTE") {
        return Ok(Some(Format::Trace));
    }
    if start.starts_with(moetrace::MAGIC) {
        return Ok(Some(Format::Moetrace));
    }
    if start.starts_with(b"PAR1") {
        return Ok(Some(Format::Parquet));
    }
    if start.starts_with(npy::MAGIC) {
        let again = Box::new(source::open(path, None)?);
        let array = npy::read(again).map_err(|why| in_file(path, why))?;
        return Ok(Some(if holds_routed(array) { Format::RoutedNpy } else { Format::LoadNpy }));
    }
    if start.starts_with(zip::MAGIC) {
        let archive = zip::Archive::open(path)?;
        return Ok(Some(match () {
            () if archive.find(|name| name.ends_with("data.pkl")).is_some() => Format::SglangPt,
            () if npz::holds_routed(&archive) => Format::RoutedNpz,
            () => Format::LoadNpz,
        }));
    }
    Ok(match () {
        () if safetensors::looks_like(start) => Some(Format::LoadSafetensors),
        () if jsonl::looks_like(start) => Some(Format::TokensJsonl),
        () if route_lines::looks_like(start) => Some(Format::RouteJsonl),
        () => None,
    })
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
