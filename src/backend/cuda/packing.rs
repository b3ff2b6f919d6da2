//! How quantised weights lie in the memory of a GPU, as `cuda/codes.cuh` reads them: tiles of 16 outputs by 128 inputs, side by side in
//! order of k, rows of tiles one after another. What a matrix does not fill of its last tiles is zero.
//!
//! A tile begins with its codes. A lane of a warp takes 16 bytes at a time, which are its share of [`Form::steps`] steps of 16 inputs; of
//! each step it has inputs `c = 2 (lane % 4)`, `c + 1` of outputs `lane / 4` and 8 further, then `c + 8`, `c + 9` of both. In fp8 these are
//! eight bytes in this order. In 4 bits they are a word whose lower nibbles are the four even ones, whose upper nibbles the odd ones.
//! Scales follow: in fp8 two floats, of outputs 0..8 and 8..16; in 4 bits the [`Group`](crate::backend::quantized::Group) of each output.

use std::thread;

use crate::backend::DType;
use crate::backend::quantized::{BLOCK, Quantized, Scales};

/// Outputs of a tile; inputs are [`BLOCK`].
pub const OUTPUTS: usize = 16;

/// Rows that may have a scale of their own: gates and ups come eight by eight.
const HALF: usize = OUTPUTS / 2;

const LANES: usize = 32;

/// A matrix of tiles is packed by so many threads at most.
const THREADS: usize = 8;

/// The layout of a tile.
#[derive(Debug, Clone, Copy)]
struct Form {
    code_bytes: usize,
    scale_bytes: usize,
}

impl Form {
    /// # Panics
    /// When `dtype` is neither F8 nor I4x2.
    fn of(dtype: DType) -> Form {
        match dtype {
            DType::F8 => Form { code_bytes: OUTPUTS * BLOCK, scale_bytes: 16 },
            DType::I4x2 => Form { code_bytes: OUTPUTS * BLOCK / 2, scale_bytes: 4 * OUTPUTS },
            other => panic!("no tiles of {other:?}"),
        }
    }

    fn bytes(self) -> usize {
        self.code_bytes + self.scale_bytes
    }

    /// Steps of 16 inputs in 16 bytes of a lane.
    fn steps(self) -> usize {
        16 * LANES * (BLOCK / 16) / self.code_bytes
    }
}

/// Bytes from one row of tiles to the next.
pub fn row_bytes(k: usize, dtype: DType) -> usize {
    k.div_ceil(BLOCK) * Form::of(dtype).bytes()
}

/// Bytes of all tiles of `[n, k]`.
pub fn bytes(n: usize, k: usize, dtype: DType) -> usize {
    n.div_ceil(OUTPUTS) * row_bytes(k, dtype)
}

/// Packs a matrix.
pub fn pack(matrix: &Quantized) -> Vec<u8> {
    let tiles = matrix.shape().0.div_ceil(OUTPUTS);
    pack_rows(tiles, &|tile| [(matrix, tile * OUTPUTS), (matrix, tile * OUTPUTS + HALF)])
}

/// Packs two matrices of one shape and form as one of twice as many outputs, eight of each in turn.
pub fn pack_dealt(gate: &Quantized, up: &Quantized) -> Vec<u8> {
    let tiles = gate.shape().0.div_ceil(HALF);
    pack_rows(tiles, &|tile| [(gate, tile * HALF), (up, tile * HALF)])
}

/// The halves of a row of tiles: a matrix and the first of eight outputs of it.
type Halves<'a> = [(&'a Quantized, usize); 2];

fn pack_rows<'a>(tiles: usize, halves: &(dyn Fn(usize) -> Halves<'a> + Sync)) -> Vec<u8> {
    if tiles == 0 {
        return Vec::new();
    }
    let (matrix, _) = halves(0)[0];
    let row = row_bytes(matrix.shape().1, matrix.dtype());
    let mut packed = vec![0; tiles * row];
    if row == 0 {
        return packed;
    }
    let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS);
    let each = tiles.div_ceil(threads);
    thread::scope(|scope| {
        for (part, packed) in packed.chunks_mut(each * row).enumerate() {
            scope.spawn(move || {
                for (i, to) in packed.chunks_exact_mut(row).enumerate() {
                    pack_row(halves(part * each + i), to);
                }
            });
        }
    });
    packed
}

/// Packs one row of tiles.
fn pack_row(halves: Halves<'_>, to: &mut [u8]) {
    let (n, k) = halves[0].0.shape();
    let form = Form::of(halves[0].0.dtype());
    let blocks = k.div_ceil(BLOCK);
    for (block, tile) in to.chunks_exact_mut(form.bytes()).enumerate() {
        let (codes, scales) = tile.split_at_mut(form.code_bytes);
        for (half, &(matrix, first)) in halves.iter().enumerate() {
            for output in first..n.min(first + HALF) {
                let start = output * k + block * BLOCK;
                let row = &matrix.codes()[start..(output * k + k).min(start + BLOCK)];
                // A group's zero need not be the code 0.
                let rest = match matrix.scales() {
                    Scales::F8(_) => 0,
                    Scales::I4(groups) => groups[output * blocks + block].zero().min(15) as u8,
                };
                place(row, rest, form, (half, output - first), codes);
                if let Scales::I4(groups) = matrix.scales() {
                    let at = 4 * (half * HALF + output - first);
                    scales[at..at + 4].copy_from_slice(&groups[output * blocks + block].bits().to_le_bytes());
                }
            }
            if let (Scales::F8(values), true) = (matrix.scales(), first < n) {
                let scale = values[first / BLOCK * blocks + block];
                scales[4 * half..4 * half + 4].copy_from_slice(&scale.to_le_bytes());
            }
        }
    }
}

/// Puts the codes of an output where the lanes want them; `rest` where there are fewer than 128.
fn place(row: &[u8], rest: u8, form: Form, (half, output): (usize, usize), codes: &mut [u8]) {
    let steps = form.steps();
    let step_bytes = 16 / steps;
    let code = |input: usize| row.get(input).copied().unwrap_or(rest);
    for step in 0..BLOCK / 16 {
        for quad in 0..4 {
            let at = (step / steps * LANES + output * 4 + quad) * 16 + step % steps * step_bytes;
            for far in 0..2 {
                let input = step * 16 + far * 8 + quad * 2;
                let (even, odd, register) = (code(input), code(input + 1), far * 2 + half);
                if step_bytes == 8 {
                    codes[at + register * 2] = even;
                    codes[at + register * 2 + 1] = odd;
                } else {
                    codes[at + register / 2] |= even << (register % 2 * 4);
                    codes[at + 2 + register / 2] |= odd << (register % 2 * 4);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::backend::quantized::{E4M3, Group};

    /// The number at an output and input of packed tiles, by the words of this module's doc.
    fn unpacked(bytes: &[u8], k: usize, dtype: DType, output: usize, input: usize) -> bf16 {
        let form = Form::of(dtype);
        let (row, tile) = (output / 16, input / 128);
        let tile = &bytes[row * row_bytes(k, dtype) + tile * form.bytes()..][..form.bytes()];
        let (output, step, within) = (output % 16, input % 128 / 16, input % 16);
        let lane = output % 8 * 4 + within % 8 / 2;
        let place = within / 8 * 2 + output / 8;
        let word = |at: usize| u32::from_le_bytes(tile[at..at + 4].try_into().unwrap());
        if dtype == DType::F8 {
            let code = tile[(step / 2 * 32 + lane) * 16 + step % 2 * 8 + place * 2 + within % 2];
            let scale = f32::from_bits(word(2048 + output / 8 * 4));
            return bf16::from_f32(E4M3[code as usize] * scale);
        }
        let codes = word((step / 4 * 32 + lane) * 16 + step % 4 * 4);
        let code = codes >> (4 * (place + within % 2 * 4)) & 15;
        Group::from_bits(word(1024 + output * 4)).weight(code as u8)
    }

    fn matrix(n: usize, k: usize, dtype: DType, seed: usize) -> Quantized {
        let values: Vec<f32> = (0..n * k).map(|i| ((i + seed) * 7919 % 2003) as f32 / 1000.0 - 0.8).collect();
        Quantized::of(&values, n, k, dtype)
    }

    #[test]
    fn every_code_is_where_the_kernel_looks_for_it() {
        for dtype in [DType::F8, DType::I4x2] {
            for (n, k) in [(16, 128), (1, 1), (40, 136), (130, 300)] {
                let single = matrix(n, k, dtype, 0);
                let packed = pack(&single);
                assert_eq!(packed.len(), bytes(n, k, dtype));
                for (i, weight) in single.weights().into_iter().enumerate() {
                    assert_eq!(unpacked(&packed, k, dtype, i / k, i % k), weight, "{dtype:?} [{n}, {k}] {i}");
                }
                let both = [single, matrix(n, k, dtype, 5)];
                let packed = pack_dealt(&both[0], &both[1]);
                assert_eq!(packed.len(), bytes(2 * n.next_multiple_of(8), k, dtype));
                for (half, matrix) in both.iter().enumerate() {
                    for (i, weight) in matrix.weights().into_iter().enumerate() {
                        let output = i / k / 8 * 16 + half * 8 + i / k % 8;
                        let found = unpacked(&packed, k, dtype, output, i % k);
                        assert_eq!(found, weight, "{dtype:?} half {half} of [{n}, {k}] {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_a_matrix_does_not_fill_is_zero() {
        for dtype in [DType::F8, DType::I4x2] {
            let (n, k) = (9, 130);
            let packed = pack(&matrix(n, k, dtype, 3));
            for (output, input) in (0..16).flat_map(|o| (0..256).map(move |i| (o, i))) {
                let inside = output < n && input < k;
                assert!(
                    inside || unpacked(&packed, k, dtype, output, input).to_f32() == 0.0,
                    "{output} {input}"
                );
            }
        }
    }

    #[test]
    fn sizes_of_published_experts() {
        // Gate and up of Mixtral-8x7B: codes, and a scale for each 8 outputs or each output in 128 inputs.
        let (n, k) = (2 * 14336, 4096);
        assert_eq!(bytes(n, k, DType::F8), n * k + n / 16 * (k / 128) * 16);
        assert_eq!(bytes(n, k, DType::I4x2), n * k / 2 + n * (k / 128) * 4);
        assert_eq!(bytes(0, 4096, DType::F8), 0);
    }
}
