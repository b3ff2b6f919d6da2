//! Weights of experts in fp8 and in 4 bits: a matrix is a tensor of codes and one of scales, both row-major.

use half::bf16;

use super::host::{Host, read_ints, write_ints};
use crate::backend::cpu::memory::{self, F8, I4x2};
use crate::backend::quantized::{BLOCK, Group, Quantized, Scales};
use crate::backend::{DType, Tensor};
use crate::error::Result;

/// Codes and scales.
pub(super) fn store(matrix: &Quantized) -> Result<[Tensor; 2]> {
    let ((n, k), dtype) = (matrix.shape(), matrix.dtype());
    let blocks = k.div_ceil(BLOCK);
    Ok(match matrix.scales() {
        Scales::F8(values) => {
            let mut codes = memory::tensor(dtype, n, k)?;
            write_ints(&matrix.codes().iter().copied().map(F8).collect::<Vec<_>>(), codes.view_mut());
            let mut scales = memory::tensor(DType::F32, n.div_ceil(BLOCK), blocks)?;
            write_ints(values, scales.view_mut());
            [codes, scales]
        }
        Scales::I4(groups) => {
            let mut codes = memory::tensor(dtype, n, k.div_ceil(2))?;
            let rows = matrix.codes().chunks_exact(k.max(1)).flat_map(|row| row.chunks(2));
            let pairs = rows.map(|pair| I4x2(pair[0] | pair.get(1).copied().unwrap_or(0) << 4));
            write_ints(&pairs.collect::<Vec<_>>(), codes.view_mut());
            let mut scales = memory::tensor(DType::I32, n, blocks)?;
            let bits: Vec<i32> = groups.iter().map(|group| group.bits() as i32).collect();
            write_ints(&bits, scales.view_mut());
            [codes, scales]
        }
    })
}

/// The numbers of a matrix of `k` inputs.
pub(super) fn read(codes: &Tensor, scales: &Tensor, k: usize) -> Host {
    let n = codes.rows();
    let matrix = if codes.dtype() == DType::F8 {
        let bytes = read_ints::<F8>(codes.view()).into_iter().map(|F8(code)| code).collect();
        Quantized::new(n, k, bytes, Scales::F8(read_ints(scales.view())))
    } else {
        let pairs = read_ints::<I4x2>(codes.view());
        let rows = pairs.chunks_exact(k.div_ceil(2).max(1));
        let bytes = rows.flat_map(|row| row.iter().flat_map(|pair| [pair.0 & 15, pair.0 >> 4]).take(k));
        let bits = read_ints::<i32>(scales.view()).into_iter();
        let groups = bits.map(|bits| Group::from_bits(bits as u32)).collect();
        Quantized::new(n, k, bytes.collect(), Scales::I4(groups))
    };
    Host { rows: n, cols: k, data: matrix.weights().into_iter().map(bf16::to_f32).collect() }
}

/// Bytes of both tensors.
pub(super) fn bytes(n: usize, k: usize, dtype: DType) -> usize {
    let blocks = k.div_ceil(BLOCK);
    match dtype {
        DType::F8 => n * k + n.div_ceil(BLOCK) * blocks * size_of::<f32>(),
        _ => n * k.div_ceil(2) + n * blocks * size_of::<Group>(),
    }
}
