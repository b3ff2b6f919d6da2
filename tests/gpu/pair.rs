//! One body on two backends: what the GPU computed against what the reference did.

use std::sync::Arc;

use half::bf16;
use moeyard::backend::cuda::CudaBackend;
use moeyard::backend::reference::ReferenceBackend;
use moeyard::backend::{Backend, DType, HostData, HostMatrix, Tensor, View};

use crate::support::numbers::Numbers;

/// A backend on which a body runs.
pub type Device<'a> = &'a dyn Backend;

fn bytes_of(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        DType::I32 => values.iter().flat_map(|&x| (x as i32).to_le_bytes()).collect(),
        other => panic!("no numbers go to a GPU as {other:?}"),
    }
}

/// A matrix with these elements, rounded to `dtype`.
pub fn tensor(device: Device<'_>, dtype: DType, rows: usize, cols: usize, values: &[f32]) -> Tensor {
    let mut tensor = device.alloc(dtype, rows, cols).unwrap();
    device.upload(&bytes_of(values, dtype), tensor.view_mut()).unwrap();
    tensor
}

/// A matrix of NaN, so that an element nobody writes is seen.
pub fn poisoned(device: Device<'_>, dtype: DType, rows: usize, cols: usize) -> Tensor {
    tensor(device, dtype, rows, cols, &vec![if dtype == DType::I32 { -7.0 } else { f32::NAN }; rows * cols])
}

/// The elements of a view.
pub fn values(device: Device<'_>, view: View<'_>) -> Vec<f32> {
    let mut bytes = vec![0; view.rows() * view.cols() * view.dtype().bytes()];
    device.download(view, &mut bytes).unwrap();
    match view.dtype() {
        DType::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        DType::Bf16 => bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        DType::I32 => bytes.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b) as f32).collect(),
        other => panic!("no numbers come from a GPU as {other:?}"),
    }
}

/// A host matrix of numbers small enough that products of `k` terms stay near 1.
pub fn host_matrix(numbers: &mut Numbers, n: usize, k: usize, dtype: DType) -> HostMatrix<'static> {
    let scale = (3.0 / k as f32).sqrt();
    let values = (0..n * k).map(|_| numbers.unit() * scale);
    let data = match dtype {
        DType::Bf16 => HostData::Bf16(values.map(bf16::from_f32).collect()),
        _ => HostData::F32(values.collect()),
    };
    HostMatrix { n, k, data }
}

/// A GPU of this test's own: a stream and its buffers.
pub fn gpu() -> Arc<dyn Backend> {
    CudaBackend::open(0).unwrap().into_dyn()
}

/// Relative error allowed where results are f32 sums of some hundred terms.
pub const CLOSE: f32 = 2e-5;
/// Where something was rounded to bf16 on the way: two units in its last place.
pub const ROUNDED: f32 = 8e-3;
/// No error.
pub const EXACT: f32 = 0.0;

/// What a result in `dtype` may be off by.
pub fn tolerance(dtype: DType) -> f32 {
    if dtype == DType::Bf16 { ROUNDED } else { CLOSE }
}

/// Runs `body` on the GPU and on the reference. Every element may differ by `tolerance`, relative to its own magnitude or the root
/// mean square of all, whichever is larger.
#[track_caller]
pub fn same(what: &str, tolerance: f32, body: impl Fn(Device<'_>) -> Vec<f32>) {
    same_on(gpu().as_ref(), what, tolerance, body);
}

/// [`same`] on a GPU backend that is used for more than one case.
#[track_caller]
pub fn same_on(gpu: Device<'_>, what: &str, tolerance: f32, body: impl Fn(Device<'_>) -> Vec<f32>) {
    let found = body(gpu);
    let expected = body(&ReferenceBackend);
    assert_eq!(found.len(), expected.len(), "{what}: elements");
    // Poison around the output is part of some results.
    let squares = expected.iter().filter(|x| x.is_finite()).map(|x| f64::from(x * x));
    let mean_square = squares.sum::<f64>() / expected.len().max(1) as f64;
    let typical = mean_square.sqrt() as f32;
    for (i, (&f, &e)) in found.iter().zip(&expected).enumerate() {
        let off = (f - e).abs();
        let good = f.to_bits() == e.to_bits() || off <= tolerance * e.abs().max(typical);
        assert!(good, "{what}: element {i} of {}: {f}, expected {e}, typical {typical}", found.len());
    }
}
