//! NumPy's `.npz`: a zip archive of `.npy` arrays.

use std::path::Path;

use serde::Deserialize;

use super::array::ArrayReader;
use super::matrix::Requests;
use super::number::Number;
use super::zip::{Archive, Entry};
use super::{in_file, npy, source};
use crate::Result;

/// Names of arrays of expert ids, the most telling first.
const ROUTED: [&str; 5] = ["topk.npy", "routed_experts.npy", "topk_ids.npy", "expert_ids.npy", "indices.npy"];
/// Names of arrays of loads.
const LOADS: [&str; 5] = ["load.npy", "loads.npy", "logical_count.npy", "counts.npy", "tokens.npy"];
/// Names of the request of each token.
const REQUESTS: [&str; 2] = ["request_id.npy", "file_id.npy"];

fn named<'a>(archive: &'a Archive, names: &[&str]) -> Option<&'a Entry> {
    names.iter().find_map(|name| archive.find(|entry| entry == *name))
}

fn array(path: &Path, archive: &Archive, entry: &Entry) -> Result<ArrayReader> {
    let data = archive.read(entry)?;
    npy::read(data).map_err(|why| in_file(path, format!("{}: {why}", entry.name)))
}

/// An archive holds routed experts, going by the names of its arrays.
pub fn holds_routed(archive: &Archive) -> bool {
    named(archive, &ROUTED).is_some()
}

/// The loads of an archive: by name, or the only array there is.
pub fn load_array(path: &Path) -> Result<ArrayReader> {
    the_array(path, &LOADS)
}

/// The routed experts of an archive: by name, or the only array there is.
pub fn routed_array(path: &Path) -> Result<ArrayReader> {
    the_array(path, &ROUTED)
}

fn the_array(path: &Path, names: &[&str]) -> Result<ArrayReader> {
    let archive = Archive::open(path)?;
    let only = match archive.entries() {
        [only] => Some(only),
        _ => None,
    };
    match named(&archive, names).or(only) {
        Some(entry) => array(path, &archive, entry),
        None => {
            let found: Vec<&str> = archive.entries().iter().map(|entry| entry.name.as_str()).collect();
            let why = format!("arrays {} where one of {} is expected", found.join(", "), names.join(", "));
            Err(in_file(path, why))
        }
    }
}

/// What `NAME.meta.json` beside `NAME.npz` says about each request; other keys are left alone.
#[derive(Deserialize)]
struct RequestMeta {
    dataset: String,
}

/// Requests and labels of the tokens, as far as an archive has them.
pub fn requests(path: &Path) -> Result<Requests> {
    let archive = Archive::open(path)?;
    let Some(entry) = named(&archive, &REQUESTS) else { return Ok(Requests::default()) };
    let refuse = |why: String| in_file(path, format!("{}: {why}", entry.name));
    let mut ids = array(path, &archive, entry)?;
    if ids.shape.len() != 1 {
        return Err(refuse(format!("shape {:?}, expected [tokens]", ids.shape)));
    }
    let mut requests = Requests::default();
    while let Some(numbers) = ids.next_record().map_err(refuse)? {
        for number in numbers {
            let id = match number {
                Number::Int(id) => u32::try_from(id).ok(),
                Number::Float(_) => None,
            };
            requests.of_token.push(id.ok_or_else(|| refuse(format!("{number:?} is no request")))?);
        }
    }
    let meta = path.with_extension("meta.json");
    if meta.is_file() {
        let text = source::read_whole(&meta, None)?;
        let of_request: Vec<RequestMeta> =
            serde_json::from_slice(&text).map_err(|e| in_file(&meta, e.to_string()))?;
        for RequestMeta { dataset } in of_request {
            let known = requests.labels.iter().position(|label| *label == dataset);
            let label = known.unwrap_or_else(|| {
                requests.labels.push(dataset);
                requests.labels.len() - 1
            });
            let label = u16::try_from(label).map_err(|_| in_file(&meta, "more than 65536 labels".into()))?;
            requests.label_of_request.push(label);
        }
        let known = requests.label_of_request.len();
        if let Some(id) = requests.of_token.iter().find(|id| **id as usize >= known) {
            return Err(in_file(
                &meta,
                format!("describes {known} requests, but tokens belong to request {id}"),
            ));
        }
    }
    Ok(requests)
}
