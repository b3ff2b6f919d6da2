//! Checkpoints whose experts hold the numbers that quantised ones stand for.

use std::path::Path;

use half::{bf16, f16};
use moeyard::backend::DType;
use moeyard::backend::quantized::Quantized;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tempfile::TempDir;

/// A copy of a model of plain matrices: those of routed and shared experts as quantising to `dtype` leaves them, in bf16.
pub fn rounded_copy(model: &Path, dtype: DType) -> TempDir {
    let folder = TempDir::new().unwrap();
    for entry in std::fs::read_dir(model).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let weights = name.starts_with("model") && name.ends_with(".safetensors");
        let bytes = if weights { rounded(&bytes, dtype) } else { bytes };
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn rounded(file: &[u8], dtype: DType) -> Vec<u8> {
    let file = SafeTensors::deserialize(file).unwrap();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut changed = 0;
    for (name, tensor) in file.tensors() {
        let (mut kind, mut data) = (tensor.dtype(), tensor.data().to_vec());
        if name.contains(".experts.") || name.contains(".shared_experts.") {
            let &[n, k] = tensor.shape() else { panic!("{name}: {:?}", tensor.shape()) };
            let weights = Quantized::of(&floats(kind, &data), n, k, dtype).weights();
            data = weights.iter().flat_map(|w| w.to_bits().to_le_bytes()).collect();
            kind = Dtype::BF16;
            changed += 1;
        }
        tensors.push((name, kind, tensor.shape().to_vec(), data));
    }
    assert!(changed > 0, "no matrix of an expert");
    let views = tensors
        .iter()
        .map(|(name, kind, shape, data)| (name, TensorView::new(*kind, shape.clone(), data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn floats(kind: Dtype, bytes: &[u8]) -> Vec<f32> {
    match kind {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        other => panic!("{other}"),
    }
}
