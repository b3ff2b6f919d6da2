//! Streams tensors into safetensors files and writes their index; holds one buffer, never a tensor.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use half::bf16;
use serde_json::{Map, Value, json};

use super::noise::Noise;
use super::shapes::{Stored, Tensor};

const BUFFER: usize = 1 << 20;
/// Bytes that a header is filled up to a multiple of.
const ALIGNMENT: usize = 8;

/// Writes all tensors and model.safetensors.index.json; gives the number of files.
pub fn write(folder: &Path, tensors: &[Tensor], seed: u64, shard_bytes: u64) -> io::Result<usize> {
    let shards = divide(tensors, shard_bytes);
    let mut weight_map = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        for tensor in &tensors[shard.clone()] {
            weight_map.insert(tensor.name.clone(), json!(name));
        }
        write_shard(&folder.join(name), tensors, shard.clone(), seed)?;
    }
    let total: u64 = tensors.iter().map(Tensor::bytes).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    fs::write(folder.join("model.safetensors.index.json"), serde_json::to_vec(&index)?)?;
    Ok(shards.len())
}

/// Runs of tensors that together stay below `shard_bytes`, or are a single one above.
fn divide(tensors: &[Tensor], shard_bytes: u64) -> Vec<Range<usize>> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (number, tensor) in tensors.iter().enumerate() {
        if number > start && bytes + tensor.bytes() > shard_bytes {
            shards.push(start..number);
            (start, bytes) = (number, 0);
        }
        bytes += tensor.bytes();
    }
    shards.push(start..tensors.len());
    shards
}

fn write_shard(path: &Path, tensors: &[Tensor], shard: Range<usize>, seed: u64) -> io::Result<()> {
    let mut file = BufWriter::with_capacity(BUFFER, File::create(path)?);
    let mut header = serde_json::to_vec(&header(&tensors[shard.clone()]))?;
    // As everybody's writer does, so that elements lie at multiples of their size.
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for number in shard {
        write_values(&mut file, &tensors[number], Noise::new(seed, number))?;
    }
    file.flush()
}

fn header(tensors: &[Tensor]) -> Value {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes();
        let dtype = match tensor.stored {
            Stored::Bf16 => "BF16",
            Stored::F32 => "F32",
        };
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
        start = end;
    }
    Value::Object(header)
}

fn write_values(file: &mut impl Write, tensor: &Tensor, mut noise: Noise) -> io::Result<()> {
    for _ in 0..tensor.len() {
        let value = tensor.mean + tensor.spread * noise.normal();
        match tensor.stored {
            Stored::Bf16 => file.write_all(&bf16::from_f32(value).to_le_bytes())?,
            Stored::F32 => file.write_all(&value.to_le_bytes())?,
        }
    }
    Ok(())
}
