//! `.safetensors`: a load matrix as a tensor `load` `[steps?, layers, experts]`. Its header is believed only as far as
//! sizes agree, and tensors are read where they are, never all at once.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use ::safetensors::Dtype;
use ::safetensors::tensor::Metadata;

use super::array::ArrayReader;
use super::number::{Element, Layout};
use super::source::{self, Output, Source};
use super::{Progress, in_file};
use crate::stream::LoadStream;
use crate::{Error, Result};

/// Largest header that is read.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Names of tensors of loads.
const LOADS: [&str; 3] = ["load", "loads", "logical_count"];

/// Where a tensor is.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// What an element is.
    pub layout: Layout,
    /// Lengths of the axes.
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub start: u64,
    /// Bytes.
    pub bytes: u64,
}

/// An open file and its tensors.
pub struct Tensors {
    /// The file.
    pub source: Source,
    /// Its tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
}

/// Whether a file begins like one.
pub fn looks_like(start: &[u8]) -> bool {
    let length = start.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    length.is_some_and(|n| n <= MAX_HEADER_BYTES) && start.get(8) == Some(&b'{')
}

/// Reads a header.
///
/// # Errors
/// [`Error::Io`], [`Error::File`].
pub fn open(path: &Path, progress: Option<Progress>) -> Result<Tensors> {
    let refuse = |why: String| in_file(path, why);
    let mut source = source::open(path, progress)?;
    let mut header = Vec::new();
    let mut take = |n: u64, header: &mut Vec<u8>| match source.by_ref().take(n).read_to_end(header) {
        Ok(read) if read as u64 == n => Ok(()),
        Ok(_) => Err(refuse("cut within its header".into())),
        Err(source) => Err(Error::Io { path: path.into(), source }),
    };
    take(8, &mut header)?;
    let length = u64::from_le_bytes(*header.first_chunk().expect("8 bytes were read"));
    if length > MAX_HEADER_BYTES {
        return Err(refuse(format!("a header of {length} bytes exceeds the limit of {MAX_HEADER_BYTES}")));
    }
    take(length, &mut header)?;
    let metadata: Metadata = serde_json::from_slice(&header[8..]).map_err(|e| refuse(e.to_string()))?;
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let Some(element) = element(info.dtype) else {
            return Err(refuse(format!("tensor {name:?} is of type {}, which is not read", info.dtype)));
        };
        let (start, end) = info.data_offsets;
        let elements = info.shape.iter().try_fold(element.bytes(), |n, len| n.checked_mul(*len));
        let bytes = end.checked_sub(start).filter(|bytes| Some(*bytes) == elements);
        let (Some(bytes), Some(at)) = (bytes, (start as u64).checked_add(8 + length)) else {
            let why = format!("tensor {name:?} of shape {:?} cannot be bytes {start}..{end}", info.shape);
            return Err(refuse(why));
        };
        let layout = Layout::little(element);
        tensors.insert(name, Tensor { layout, shape: info.shape.clone(), start: at, bytes: bytes as u64 });
    }
    Ok(Tensors { source, tensors })
}

fn element(dtype: Dtype) -> Option<Element> {
    Some(match dtype {
        Dtype::U8 => Element::U8,
        Dtype::I8 => Element::I8,
        Dtype::U16 => Element::U16,
        Dtype::I16 => Element::I16,
        Dtype::U32 => Element::U32,
        Dtype::I32 => Element::I32,
        Dtype::U64 => Element::U64,
        Dtype::I64 => Element::I64,
        Dtype::F16 => Element::F16,
        Dtype::BF16 => Element::Bf16,
        Dtype::F32 => Element::F32,
        Dtype::F64 => Element::F64,
        _ => return None,
    })
}

/// The loads of a file: by name, or its only tensor.
///
/// # Errors
/// [`Error::Io`], [`Error::File`].
pub fn load_array(path: &Path, progress: Option<Progress>) -> Result<ArrayReader> {
    let Tensors { mut source, tensors } = open(path, progress)?;
    let only = tensors.values().next().filter(|_| tensors.len() == 1);
    let Some(tensor) = LOADS.iter().find_map(|name| tensors.get(*name)).or(only) else {
        let found: Vec<&str> = tensors.keys().map(String::as_str).take(8).collect();
        let why = format!(
            "{} tensors ({} ...) where one of {} is expected",
            tensors.len(),
            found.join(", "),
            LOADS.join(", ")
        );
        return Err(in_file(path, why));
    };
    source.seek(SeekFrom::Start(tensor.start)).map_err(|source| Error::Io { path: path.into(), source })?;
    ArrayReader::new(tensor.layout, tensor.shape.clone(), false, Box::new(source.take(tensor.bytes)))
        .map_err(|why| in_file(path, why))
}

/// Writes a tensor `load`, uint64 `[windows, layers, experts]`, with the layers' indices in the metadata. The header
/// comes first and holds the number of windows, so the data are written behind room for it.
///
/// # Errors
/// Those of the stream, [`Error::Io`].
pub fn write(path: &Path, loads: &mut dyn LoadStream) -> Result<u64> {
    const HEADER_BYTES: usize = 512;
    let mut output = Output::create(path)?;
    let mut window = loads.empty_window();
    output.write_all(&[b' '; 8 + HEADER_BYTES]).map_err(|e| output.error(e))?;
    let (layers, experts) = (window.layers(), window.experts());
    let mut windows = 0u64;
    while loads.next_window(&mut window)? {
        for layer in 0..layers {
            for count in window.totals(layer) {
                output.write_all(&count.to_le_bytes()).map_err(|e| output.error(e))?;
            }
        }
        windows += 1;
    }
    let bytes = windows * (layers * experts * 8) as u64;
    let header = format!(
        "{{\"__metadata__\":{{\"first_layer\":\"{}\"}},\"load\":{{\"dtype\":\"U64\",\"shape\":[{windows},{layers},{experts}],\"data_offsets\":[0,{bytes}]}}}}",
        window.layer_ids().first().copied().unwrap_or(0)
    );
    let mut start = (HEADER_BYTES as u64).to_le_bytes().to_vec();
    start.extend_from_slice(header.as_bytes());
    assert!(start.len() <= 8 + HEADER_BYTES, "a header of {} bytes", header.len());
    let written = output.seek(SeekFrom::Start(0)).and_then(|_| output.write_all(&start));
    written.map_err(|e| output.error(e))?;
    output.finish_with(windows)
}
