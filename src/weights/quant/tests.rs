//! Every format against its formula, element by element, on random bytes; blocks against the whole.

use super::*;
use crate::backend::quantized::{E4M3, Quantized};
use half::{bf16, f16};
use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use std::ops::Range;

struct Random(ChaCha8Rng);

impl Random {
    fn new(seed: u64) -> Random {
        Random(ChaCha8Rng::seed_from_u64(seed))
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.fill_bytes(&mut bytes);
        bytes
    }

    fn below(&mut self, end: usize) -> usize {
        self.0.next_u32() as usize % end
    }

    /// `len` finite numbers of magnitude 0.5 to 2.
    fn floats(&mut self, float: Float, len: usize) -> Vec<u8> {
        let number = |rng: &mut ChaCha8Rng| {
            let bits = rng.next_u32();
            f32::from_bits((bits & 0x8000_0000) | (126 << 23) | (bits & 0x00ff_e000))
        };
        let mut out = Vec::new();
        for _ in 0..len {
            let value = number(&mut self.0);
            match float {
                Float::F32 => out.extend(value.to_le_bytes()),
                Float::F16 => out.extend(f16::from_f32(value).to_le_bytes()),
                Float::Bf16 => out.extend(bf16::from_f32(value).to_le_bytes()),
            }
        }
        out
    }
}

/// Element `i`, decoded the slow way.
fn float(kind: Float, bytes: &[u8], i: usize) -> f32 {
    match kind {
        Float::F32 => f32::from_le_bytes(bytes[4 * i..][..4].try_into().unwrap()),
        Float::F16 => f16::from_le_bytes(bytes[2 * i..][..2].try_into().unwrap()).to_f32(),
        Float::Bf16 => bf16::from_le_bytes(bytes[2 * i..][..2].try_into().unwrap()).to_f32(),
    }
}

/// 4-bit value `i` of an array of little-endian words.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    (bytes[i / 2] >> (4 * (i % 2))) & 15
}

/// `block` must equal `element` on the whole matrix and on random blocks, bit for bit.
fn check(
    random: &mut Random,
    [n, k]: [usize; 2],
    element: impl Fn(usize, usize) -> f32,
    block: impl Fn(Range<usize>, Range<usize>, &mut [f32]),
) {
    let mut blocks = vec![(0..n, 0..k)];
    for _ in 0..8 {
        let (row, col) = (random.below(n), random.below(k));
        blocks.push((row..row + 1 + random.below(n - row), col..col + 1 + random.below(k - col)));
    }
    for (rows, cols) in blocks {
        let mut out = vec![f32::NAN; rows.len() * cols.len()];
        block(rows.clone(), cols.clone(), &mut out);
        let expected: Vec<f32> = rows
            .clone()
            .flat_map(|r| cols.clone().map(move |c| (r, c)))
            .map(|(r, c)| element(r, c))
            .collect();
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&out), bits(&expected), "[{n}, {k}], block {rows:?} x {cols:?}");
    }
}

const FLOATS: [Float; 3] = [Float::F32, Float::F16, Float::Bf16];

#[test]
fn plain_matrices_in_both_orders() {
    let mut random = Random::new(1);
    for kind in FLOATS {
        for [n, k] in [[1usize, 1usize], [5, 7], [40, 33]] {
            let bytes = random.floats(kind, 3 + 2 * n * k);
            let plain = Plain::rows_of(&bytes, kind, 3, k);
            check(
                &mut random,
                [n, k],
                |r, c| float(kind, &bytes, 3 + r * k + c),
                |r, c, out| plain.block(r, c, out),
            );
            // In x out, every second column.
            let plain = Plain { bytes: &bytes, float: kind, first: 1, row_stride: 2, col_stride: 2 * n };
            let element = |r, c| float(kind, &bytes, 1 + 2 * (c * n + r));
            check(&mut random, [n, k], element, |r, c, out| plain.block(r, c, out));
        }
    }
}

#[test]
fn bf16_is_copied_only_where_it_lies_in_rows() {
    let mut random = Random::new(2);
    let bytes = random.floats(Float::Bf16, 6);
    let mut out = [bf16::ZERO; 2];
    assert!(Plain::rows_of(&bytes, Float::Bf16, 0, 3).copy_bf16(0..2, 1..2, &mut out));
    assert_eq!(out.map(bf16::to_f32), [1, 4].map(|i| float(Float::Bf16, &bytes, i)));
    assert!(!Plain::rows_of(&bytes[..4], Float::F16, 0, 2).copy_bf16(0..1, 0..2, &mut out));
    let columns = Plain { bytes: &bytes, float: Float::Bf16, first: 0, row_stride: 1, col_stride: 2 };
    assert!(!columns.copy_bf16(0..2, 0..1, &mut out));
}

#[test]
fn e4m3_codes() {
    let value = |code: u8| E4M3[code as usize];
    for (code, expected) in [
        (0x00, 0.0),
        (0x01, 1.0 / 512.0),
        (0x07, 7.0 / 512.0),
        (0x08, 1.0 / 64.0),
        (0x38, 1.0),
        (0x39, 1.125),
        (0x7e, 448.0),
        (0xb8, -1.0),
        (0xfe, -448.0),
    ] {
        assert_eq!(value(code), expected, "code {code:#x}");
    }
    assert_eq!(value(0x80).to_bits(), (-0.0f32).to_bits());
    assert!(value(0x7f).is_nan() && value(0xff).is_nan());
    assert!((0..=255u8).all(|code| value(code).is_nan() == (code & 0x7f == 0x7f)));
}

#[test]
fn fp8_with_blocks_of_any_size_and_short_edges() {
    let mut random = Random::new(3);
    for [n, k] in [[136usize, 160usize], [128, 128], [1, 300], [129, 5]] {
        for block in [[128, 128], [64, 128], [3, 7], [1, 1], [1000, 1000]] {
            for kind in FLOATS {
                let mut codes = random.bytes(n * k);
                codes.iter_mut().filter(|code| **code & 0x7f == 0x7f).for_each(|code| *code = 0x38);
                let per_row = k.div_ceil(block[1]);
                let scales = random.floats(kind, n.div_ceil(block[0]) * per_row);
                let fp8 = Fp8::new(&codes, &scales, kind, [n, k], block);
                let element = |r: usize, c: usize| {
                    E4M3[codes[r * k + c] as usize]
                        * float(kind, &scales, r / block[0] * per_row + c / block[1])
                };
                check(&mut random, [n, k], element, |r, c, out| fp8.block(r, c, out));
            }
        }
    }
}

#[test]
fn awq_with_groups_of_any_size() {
    let mut random = Random::new(4);
    for [n, k] in [[8usize, 1usize], [96, 128], [64, 50], [16, 200]] {
        for group in [1, 7, 32, 128, k] {
            let groups = k.div_ceil(group);
            let (qweight, qzeros) = (random.bytes(k * n / 2), random.bytes(groups * n / 2));
            let scales = random.floats(Float::F16, groups * n);
            let awq = Awq::new(&qweight, &qzeros, &scales, Float::F16, [n, k], group);
            let element = |o: usize, i: usize| {
                // Output o is nibble `place` of its word, the inverse of the order in the file.
                let place = [0, 4, 1, 5, 2, 6, 3, 7][o % 8];
                let at = |row: usize| row * n + o / 8 * 8 + place;
                let q = nibble(&qweight, at(i)) as f32 - nibble(&qzeros, at(i / group)) as f32;
                q * float(Float::F16, &scales, i / group * n + o)
            };
            check(&mut random, [n, k], element, |r, c, out| awq.block(r, c, out));
        }
    }
}

#[test]
fn gptq_with_and_without_act_order() {
    let mut random = Random::new(5);
    for [n, k] in [[1usize, 1usize], [96, 128], [65, 50], [130, 24]] {
        for group in [1, 7, 32, k] {
            let (groups, zero_words) = (k.div_ceil(group), n.div_ceil(8));
            let (qweight, qzeros) =
                (random.bytes(k.div_ceil(8) * n * 4), random.bytes(groups * zero_words * 4));
            let scales = random.floats(Float::F16, groups * n);
            let order: Vec<usize> = (0..k).map(|_| random.below(groups)).collect();
            let g_idx: Vec<u8> = order.iter().flat_map(|&group| (group as i32).to_le_bytes()).collect();
            for act_order in [false, true] {
                let parts = [&qweight[..], &qzeros[..], &scales[..]];
                let gptq = Gptq::new(parts, act_order.then_some(&g_idx[..]), Float::F16, [n, k], group);
                let element = |o: usize, i: usize| {
                    let group = if act_order { order[i] } else { i / group };
                    let q = nibble(&qweight, (i / 8 * n + o) * 8 + i % 8) as f32;
                    let z = nibble(&qzeros, group * zero_words * 8 + o) as f32 + 1.0;
                    (q - z) * float(Float::F16, &scales, group * n + o)
                };
                check(&mut random, [n, k], element, |r, c, out| gptq.block(r, c, out).unwrap());
            }
        }
    }
}

#[test]
fn gptq_groups_that_are_not_there_are_refused() {
    let (qweight, qzeros, scales) = ([0; 32], [0; 8], [0; 4]);
    let g_idx: Vec<u8> = [0, 1, -1, 2, 1, 0, 0, 1].iter().flat_map(|&g: &i32| g.to_le_bytes()).collect();
    let gptq = Gptq::new([&qweight[..4], &qzeros, &scales], Some(&g_idx), Float::F16, [1, 8], 4);
    assert_eq!(gptq.groups_of(0..2), Ok(vec![0, 1]));
    assert_eq!(gptq.groups_of(0..8), Err(BadGroup { input: 2, group: -1, groups: 2 }));
    assert_eq!(gptq.block(0..1, 3..4, &mut [0.0]), Err(BadGroup { input: 3, group: 2, groups: 2 }));
}

#[test]
fn mxfp4_with_short_blocks_and_alternating_rows() {
    let mut random = Random::new(6);
    for [n, k] in [[1usize, 32usize], [6, 96], [5, 40], [3, 7]] {
        let per_row = k.div_ceil(32);
        let stored = 1 + 2 * n;
        let blocks = random.bytes(stored * per_row * 16);
        // 255 is NaN, whose bits are not compared here.
        let scales: Vec<u8> = random.bytes(stored * per_row).iter().map(|code| code % 255).collect();
        let mxfp4 = Mxfp4::new(&blocks, &scales, k, 1, 2);
        let element = |r: usize, c: usize| {
            let at = (1 + 2 * r) * per_row + c / 32;
            let code = nibble(&blocks, at * 32 + c % 32);
            let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
            let scale = 2f64.powi(i32::from(scales[at]) - 127) as f32;
            if code & 8 == 0 { magnitude * scale } else { -magnitude * scale }
        };
        check(&mut random, [n, k], element, |r, c, out| mxfp4.block(r, c, out));
    }
    assert!(mxfp4::power_of_two(255).is_nan());
    assert_eq!(mxfp4::power_of_two(0), 2f32.powi(-127));
}

/// What is handed out as it is stored stands for the numbers that are read otherwise; blocks that cut through a scale's are refused.
fn keeps(
    [n, k]: [usize; 2],
    quantized: impl Fn(Range<usize>, Range<usize>) -> Option<Quantized>,
    block: impl Fn(Range<usize>, Range<usize>, &mut [f32]),
) {
    for (rows, cols) in [(0..n, 0..k), (0..n.min(128), 128.min(k)..k), (128.min(n)..n, 0..1.min(k))] {
        let found =
            quantized(rows.clone(), cols.clone()).unwrap_or_else(|| panic!("[{n}, {k}] {rows:?} x {cols:?}"));
        let mut expected = vec![f32::NAN; rows.len() * cols.len()];
        block(rows.clone(), cols.clone(), &mut expected);
        assert_eq!(found.shape(), (rows.len(), cols.len()));
        let bits = found.weights().iter().map(|w| w.to_bits()).collect::<Vec<_>>();
        let expected = expected.into_iter().map(|x| bf16::from_f32(x).to_bits()).collect::<Vec<_>>();
        assert!(bits == expected, "[{n}, {k}] {rows:?} x {cols:?}");
    }
}

#[test]
fn fp8_in_blocks_of_128_is_handed_out_as_it_is() {
    let mut random = Random::new(6);
    for kind in FLOATS {
        let [n, k] = [200, 300];
        let mut codes = random.bytes(n * k);
        codes.iter_mut().filter(|code| **code & 0x7f == 0x7f).for_each(|code| *code = 0x38);
        let scales = random.floats(kind, 2 * 3);
        let fp8 = Fp8::new(&codes, &scales, kind, [n, k], [128, 128]);
        keeps([n, k], |r, c| fp8.quantized(r, c), |r, c, out| fp8.block(r, c, out));
        assert_eq!(fp8.quantized(0..n, 0..k).unwrap().codes(), codes);
        assert!(fp8.quantized(64..128, 0..k).is_none() && fp8.quantized(0..n, 1..k).is_none());
        let scales = random.floats(kind, 4 * 3);
        assert!(Fp8::new(&codes, &scales, kind, [n, k], [64, 128]).quantized(0..n, 0..k).is_none());
    }
}

#[test]
fn four_bits_in_groups_of_128_are_handed_out_as_they_are() {
    let mut random = Random::new(7);
    let [n, k] = [136usize, 400usize];
    for group in [128, 256, k] {
        let groups = k.div_ceil(group);
        for kind in [Float::F16, Float::Bf16] {
            let (qweight, qzeros) = (random.bytes(k * n / 2), random.bytes(groups * n / 2));
            let scales = random.floats(kind, groups * n);
            let awq = Awq::new(&qweight, &qzeros, &scales, kind, [n, k], group);
            keeps([n, k], |r, c| awq.quantized(r, c), |r, c, out| awq.block(r, c, out));
            assert_eq!(awq.quantized(3..9, 100..200).is_none(), group == 128, "128 inputs of two groups");
            let gptq = Gptq::new([&qweight, &qzeros, &scales], None, kind, [n, k], group);
            keeps([n, k], |r, c| gptq.quantized(r, c), |r, c, out| gptq.block(r, c, out).unwrap());
        }
    }
    // Scales with more bits than fit, groups of fewer inputs, inputs in another order.
    let (qweight, qzeros) = (random.bytes(k * n / 2), random.bytes(k.div_ceil(32) * n / 2));
    let scales = random.floats(Float::F32, k.div_ceil(32) * n);
    let inverse = |i: usize| i.to_le_bytes()[..4].to_vec();
    let order: Vec<u8> = (0..k).flat_map(|input| inverse((k - 1 - input) / 128)).collect();
    let part = |groups: usize| [&qweight[..], &qzeros[..groups * n / 2], &scales[..groups * n * 4]];
    let [weights, zeros, exact] = part(4);
    let odd: Vec<u8> = exact.chunks(4).flat_map(|b| (float(Float::F32, b, 0) * 1.1).to_le_bytes()).collect();
    assert!(Awq::new(weights, zeros, &odd, Float::F32, [n, k], 128).quantized(0..n, 0..k).is_none());
    assert!(Gptq::new([weights, zeros, &odd], None, Float::F32, [n, k], 128).quantized(0..n, 0..k).is_none());
    let [weights, zeros, exact] = part(13);
    assert!(Awq::new(weights, zeros, exact, Float::F32, [n, k], 32).quantized(0..n, 0..k).is_none());
    let [weights, zeros, exact] = part(4);
    let shuffled = Gptq::new([weights, zeros, exact], Some(&order), Float::F32, [n, k], 128);
    assert!(shuffled.quantized(0..n, 0..k).is_none());
}
