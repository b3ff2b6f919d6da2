//! Linear layers, MLPs and grouped experts, and what their bits may not depend on.

use libtest_mimic::Trial;
use moeyard::backend::cuda::{CudaBackend, ProductKernels};
use moeyard::backend::{DType, ExpertsArgs, HostMlp, HostMlpBias, Mlp, Precision, Tensor};
use moeyard::spec::Activation;

use crate::pair::{Device, ROUNDED, gpu, host_matrix, poisoned, same, tensor, tolerance, values};
use crate::support::numbers::Numbers;
use crate::trial;

pub const SWIGLU: Activation = Activation::ClampedSwiglu { limit: 0.7, alpha: 1.7 };

pub fn trials() -> Vec<Trial> {
    vec![
        trial("products::linear", linear),
        trial("products::linear_of_strided_rows", linear_of_strided_rows),
        trial("products::mlp", mlp),
        trial("products::experts_of_any_load", experts_of_any_load),
        trial("products::many_small_experts", many_small_experts),
        trial("products::footprints_are_what_is_allocated", footprints_are_what_is_allocated),
        trial("products::a_row_has_the_same_bits_in_every_batch", a_row_has_the_same_bits_in_every_batch),
        trial(
            "products::an_expert_has_the_same_bits_in_every_slot",
            an_expert_has_the_same_bits_in_every_slot,
        ),
        trial("products::kernels_agree_on_linear", kernels_agree_on_linear),
        trial("products::kernels_agree_on_long_sums", kernels_agree_on_long_sums),
        trial("products::kernels_agree_on_experts", kernels_agree_on_experts),
        trial("products::kernels_agree_on_many_experts", kernels_agree_on_many_experts),
    ]
}

fn linear() {
    let mut numbers = Numbers::new(11);
    let shapes = [
        (1, 1, 1),
        (3, 5, 7),
        (1, 64, 64),
        (17, 96, 200),
        (8, 256, 1024),
        (64, 136, 72),
        (70, 48, 33),
        (130, 300, 128),
        (257, 129, 520),
        (1, 4096, 2048),
        (0, 16, 16),
    ];
    for precision in Precision::ALL {
        for (rows, n, k) in shapes {
            let (x, bias) = (numbers.vec(rows * k), numbers.vec(n));
            let w = host_matrix(&mut numbers, n, k, precision.weights);
            for (biased, out_type) in [(false, DType::F32), (true, DType::F32), (true, DType::Bf16)] {
                same(
                    &format!("{precision:?} {rows} x {n} x {k} to {out_type:?}"),
                    tolerance(out_type),
                    |device| {
                        let x = tensor(device, precision.activations, rows, k, &x);
                        let w = device.pack_matrix(&w, precision.weights).unwrap();
                        let bias = tensor(device, DType::F32, 1, n, &bias);
                        let mut out = poisoned(device, out_type, rows, n);
                        device.linear(x.view(), &w, biased.then(|| bias.view()), out.view_mut()).unwrap();
                        values(device, out.view())
                    },
                );
            }
        }
    }
}

fn linear_of_strided_rows() {
    let mut numbers = Numbers::new(12);
    for precision in Precision::ALL {
        for shift in [0, 3, 8] {
            let (rows, n, k) = (37, 40, 64);
            let x = numbers.vec(rows * (k + 16));
            let w = host_matrix(&mut numbers, n, k, precision.weights);
            same(&format!("{precision:?} from column {shift}"), tolerance(DType::F32), |device| {
                let x = tensor(device, precision.activations, rows, k + 16, &x);
                let w = device.pack_matrix(&w, precision.weights).unwrap();
                let mut out = poisoned(device, DType::F32, rows, n + 5);
                let target = out.view_mut().cols_range(2..2 + n);
                device.linear(x.view().cols_range(shift..shift + k), &w, None, target).unwrap();
                values(device, out.view())
            });
        }
    }
}

pub fn host_mlp(
    numbers: &mut Numbers,
    hidden: usize,
    width: usize,
    bias: bool,
    dtype: DType,
) -> HostMlp<'static> {
    HostMlp {
        gate: host_matrix(numbers, width, hidden, dtype),
        up: host_matrix(numbers, width, hidden, dtype),
        down: host_matrix(numbers, hidden, width, dtype),
        bias: bias.then(|| HostMlpBias {
            gate: numbers.vec(width),
            up: numbers.vec(width),
            down: numbers.vec(hidden),
        }),
    }
}

/// The product between the matrices is rounded in bf16 runs.
fn mlp_tolerance(precision: Precision) -> f32 {
    tolerance(precision.activations)
}

fn mlp() {
    let mut numbers = Numbers::new(13);
    for precision in Precision::ALL {
        for (rows, hidden, width) in [(1, 8, 8), (5, 24, 20), (33, 128, 100), (3, 33, 17), (140, 64, 256)] {
            for (activation, bias) in [(Activation::SiluMul, false), (SWIGLU, true)] {
                let host = host_mlp(&mut numbers, hidden, width, bias, precision.weights);
                let x = numbers.vec(rows * hidden);
                same(
                    &format!("{precision:?} {rows} x {hidden} x {width} {bias}"),
                    mlp_tolerance(precision),
                    |device| {
                        let w = device.pack_mlp(&host, precision.weights).unwrap();
                        let x = tensor(device, precision.activations, rows, hidden, &x);
                        let mut out = poisoned(device, DType::F32, rows, hidden);
                        device.mlp(x.view(), &w, activation, out.view_mut()).unwrap();
                        values(device, out.view())
                    },
                );
            }
        }
    }
}

pub fn run_experts(
    device: Device<'_>,
    x: &Tensor,
    counts: &[usize],
    slots: &[Option<Mlp>],
    activation: Activation,
) -> Vec<f32> {
    let offsets: Vec<usize> =
        std::iter::once(0).chain(counts.iter().scan(0, |sum, n| Some(add(sum, *n)))).collect();
    let mut out = poisoned(device, x.dtype(), x.rows(), x.cols());
    let args = ExpertsArgs { rows: x.view(), offsets: &offsets, slots, activation };
    device.experts(args, out.view_mut()).unwrap();
    values(device, out.view())
}

fn add(sum: &mut usize, n: usize) -> usize {
    *sum += n;
    *sum
}

fn experts_of_any_load() {
    let mut numbers = Numbers::new(14);
    let loads: [&[usize]; 7] =
        [&[0, 0, 0], &[1, 0, 0], &[0, 1, 2], &[9, 0, 17], &[64, 65, 0], &[0, 0, 200], &[130, 3, 1]];
    for precision in Precision::ALL {
        for (hidden, width) in [(64, 96), (24, 20), (33, 17)] {
            for (activation, bias) in [(Activation::SiluMul, false), (SWIGLU, true)] {
                let experts: Vec<HostMlp> =
                    (0..2).map(|_| host_mlp(&mut numbers, hidden, width, bias, precision.weights)).collect();
                for counts in loads {
                    let rows: usize = counts.iter().sum();
                    let x = numbers.vec(rows * hidden);
                    // Without rows in the middle its slot is empty.
                    let middle = counts[1] > 0;
                    same(&format!("{precision:?} {hidden} x {width} {counts:?}"), ROUNDED, |device| {
                        let pack = |e: &HostMlp<'_>| device.pack_mlp(e, precision.weights).unwrap();
                        let slots = [
                            Some(pack(&experts[0])),
                            middle.then(|| pack(&experts[1])),
                            Some(pack(&experts[1])),
                        ];
                        let x = tensor(device, precision.activations, rows, hidden, &x);
                        run_experts(device, &x, counts, &slots, activation)
                    });
                }
            }
        }
    }
}

fn many_small_experts() {
    let mut numbers = Numbers::new(15);
    let (hidden, width) = (32, 16);
    let host: Vec<HostMlp> =
        (0..150).map(|_| host_mlp(&mut numbers, hidden, width, false, DType::Bf16)).collect();
    let counts: Vec<usize> = (0..150).map(|_| numbers.below(4).saturating_sub(1)).collect();
    let rows: usize = counts.iter().sum();
    let x = numbers.vec(rows * hidden);
    same("150 experts", ROUNDED, |device| {
        let slots: Vec<Option<Mlp>> =
            host.iter().map(|e| Some(device.pack_mlp(e, DType::Bf16).unwrap())).collect();
        let x = tensor(device, DType::Bf16, rows, hidden, &x);
        run_experts(device, &x, &counts, &slots, Activation::SiluMul)
    });
}

fn footprints_are_what_is_allocated() {
    let owner = gpu();
    let gpu = owner.as_ref();
    let mut numbers = Numbers::new(16);
    for dtype in [DType::F32, DType::Bf16] {
        let matrix = host_matrix(&mut numbers, 7, 13, DType::F32);
        let packed = gpu.pack_matrix(&matrix, dtype).unwrap();
        assert_eq!(packed.data.bytes(), gpu.matrix_bytes(7, 13, dtype));
        for bias in [false, true] {
            let mlp = host_mlp(&mut numbers, 24, 21, bias, DType::F32);
            let bytes: usize = gpu.pack_mlp(&mlp, dtype).unwrap().parts.iter().map(Tensor::bytes).sum();
            assert_eq!(bytes, gpu.mlp_bytes(24, 21, bias, dtype));
        }
        let kv_b = host_matrix(&mut numbers, 3 * (12 + 9), 20, DType::F32);
        let bytes: usize =
            gpu.pack_mla(&kv_b, 3, 12, 9, dtype).unwrap().parts.iter().map(Tensor::bytes).sum();
        assert_eq!(bytes, gpu.mla_bytes(3, 12, 9, 20, dtype));
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The tile follows the number of rows; the bits must not.
fn a_row_has_the_same_bits_in_every_batch() {
    let owner = gpu();
    let gpu = owner.as_ref();
    let mut numbers = Numbers::new(17);
    for precision in Precision::ALL {
        let (n, k) = (320, 1000);
        let w =
            gpu.pack_matrix(&host_matrix(&mut numbers, n, k, precision.weights), precision.weights).unwrap();
        let x = numbers.vec(300 * k);
        let x = tensor(gpu, precision.activations, 300, k, &x);
        let run = |rows: std::ops::Range<usize>| {
            let mut out = poisoned(gpu, DType::F32, rows.len(), n);
            gpu.linear(x.view().rows_range(rows), &w, None, out.view_mut()).unwrap();
            bits(&values(gpu, out.view()))
        };
        let whole = run(0..300);
        for rows in [0..1, 7..8, 3..12, 10..30, 100..140, 90..180, 0..200, 299..300] {
            assert_eq!(run(rows.clone()), whole[rows.start * n..rows.end * n], "{precision:?} rows {rows:?}");
        }
    }
}

/// Placement moves experts between slots and splits their rows between replicas; neither may show.
fn an_expert_has_the_same_bits_in_every_slot() {
    let owner = gpu();
    let gpu = owner.as_ref();
    let mut numbers = Numbers::new(18);
    for precision in Precision::ALL {
        let (hidden, width) = (256, 192);
        let host: Vec<HostMlp> =
            (0..3).map(|_| host_mlp(&mut numbers, hidden, width, false, precision.weights)).collect();
        let pack = |e: usize| Some(gpu.pack_mlp(&host[e], precision.weights).unwrap());
        let data = numbers.vec(150 * hidden);
        let counts = [20, 100, 30];
        let plain = [pack(0), pack(1), pack(2)];
        let all = |rows: &[f32]| tensor(gpu, precision.activations, rows.len() / hidden, hidden, rows);
        let expected = bits(&run_experts(gpu, &all(&data), &counts, &plain, Activation::SiluMul));
        // Expert 1 in two replicas, 2 before 0, an empty slot.
        let (e0, rest) = data.split_at(20 * hidden);
        let (e1, e2) = rest.split_at(100 * hidden);
        let moved = [e2, &e1[..90 * hidden], e0, &e1[90 * hidden..]].concat();
        let slots = [pack(2), pack(1), None, pack(0), pack(1)];
        let found = bits(&run_experts(gpu, &all(&moved), &[30, 90, 0, 20, 10], &slots, Activation::SiluMul));
        let at = |from: usize, rows: usize| found[from * hidden..(from + rows) * hidden].to_vec();
        let back = [at(120, 20), at(30, 90), at(140, 10), at(0, 30)].concat();
        assert_eq!(back, expected, "{precision:?}");
    }
}

/// Backends on the same GPU with every choice of kernels and tiles, the plainest first.
fn all_kernels() -> Vec<(ProductKernels, std::sync::Arc<dyn moeyard::backend::Backend>)> {
    let grouped = [0, 32, 96, 160, 256].map(|rows| ProductKernels::Clusters { rows });
    [ProductKernels::Portable, ProductKernels::Best]
        .into_iter()
        .chain(grouped)
        .map(|kernel| (kernel, CudaBackend::open(0).unwrap().with_products(kernel).into_dyn()))
        .collect()
}

#[track_caller]
pub fn same_bits(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}: elements");
    let off = found.iter().zip(expected).filter(|(f, e)| f.to_bits() != e.to_bits()).count();
    if let Some(i) = found.iter().zip(expected).position(|(f, e)| f.to_bits() != e.to_bits()) {
        panic!(
            "{what}: {off} of {} differ, the first is {i}: {}, not {}",
            found.len(),
            found[i],
            expected[i]
        );
    }
}

fn kernels_agree_on_linear() {
    agree_on_linear(&[
        (1, 16, 8),
        (3, 200, 520),
        (17, 130, 72),
        (40, 64, 4096),
        (64, 1000, 136),
        (65, 16, 8),
        (128, 128, 64),
        (129, 136, 72),
        (200, 8, 136),
        (257, 129, 520),
        (300, 320, 1000),
        (1000, 528, 200),
        (4500, 272, 64),
    ]);
}

fn kernels_agree_on_long_sums() {
    agree_on_linear(&[(520, 384, 4096)]);
}

/// Every kernel against the plainest, by few rows at a time. Shapes are rows, outputs and k.
fn agree_on_linear(shapes: &[(usize, usize, usize)]) {
    let mut numbers = Numbers::new(19);
    let kernels = all_kernels();
    for &(rows, n, k) in shapes {
        let host = host_matrix(&mut numbers, n, k, DType::Bf16);
        let (x, bias) = (numbers.vec(rows * (k + 8)), numbers.vec(n));
        for (out_type, biased, shift) in [
            (DType::F32, false, 0),
            (DType::Bf16, false, 0),
            (DType::Bf16, true, 4),
            (DType::Bf16, true, 1),
            (DType::F32, true, 3),
        ] {
            let mut expected = None;
            for (kernel, gpu) in &kernels {
                let gpu = gpu.as_ref();
                let w = gpu.pack_matrix(&host, DType::Bf16).unwrap();
                // Columns beyond k that must not matter.
                let mut spoilt = x.clone();
                spoilt.chunks_mut(k + 8).for_each(|row| row[k..].fill(f32::NAN));
                let x = tensor(gpu, DType::Bf16, rows, k + 8, &spoilt);
                let bias = tensor(gpu, DType::F32, 1, n, &bias);
                let run = |piece: usize| {
                    let mut out = poisoned(gpu, out_type, rows, n + 8);
                    for first in (0..rows).step_by(piece) {
                        let range = first..rows.min(first + piece);
                        let x = x.view().rows_range(range.clone()).cols_range(0..k);
                        let out = out.view_mut().rows_range(range).cols_range(shift..shift + n);
                        gpu.linear(x, &w, biased.then(|| bias.view()), out).unwrap();
                    }
                    values(gpu, out.view())
                };
                // By the plainest kernels, and few rows at a time, which they do by another one than many.
                let expected = expected.get_or_insert_with(|| run(50));
                same_bits(&format!("{kernel:?} {rows} x {n} x {k} to {out_type:?}"), &run(rows), expected);
            }
        }
    }
}

/// Every slot's rows by themselves, 50 at a time, against all at once.
fn agree_on_experts(hidden: usize, width: usize, counts: &[usize], case: (Activation, bool), scale: f32) {
    let (activation, bias) = case;
    let mut numbers = Numbers::new(20);
    let host: Vec<HostMlp> =
        counts.iter().map(|_| host_mlp(&mut numbers, hidden, width, bias, DType::Bf16)).collect();
    let rows: usize = counts.iter().sum();
    let data: Vec<f32> = numbers.vec(rows * hidden).iter().map(|x| x * scale).collect();
    let mut expected = None;
    for (kernel, gpu) in all_kernels() {
        let gpu = gpu.as_ref();
        // A slot without rows is empty now and then.
        let slots: Vec<Option<Mlp>> = (0..counts.len())
            .map(|s| (counts[s] > 0 || s % 2 == 0).then(|| gpu.pack_mlp(&host[s], DType::Bf16).unwrap()))
            .collect();
        let found =
            run_experts(gpu, &tensor(gpu, DType::Bf16, rows, hidden, &data), counts, &slots, activation);
        let expected = expected.get_or_insert_with(|| {
            let mut left = data.as_slice();
            let mut all = Vec::new();
            for (s, &count) in counts.iter().enumerate() {
                let mut rows = count;
                while rows > 0 {
                    let piece = rows.min(50);
                    let (now, rest) = left.split_at(piece * hidden);
                    let mut only = vec![0; counts.len()];
                    only[s] = piece;
                    let x = tensor(gpu, DType::Bf16, piece, hidden, now);
                    all.extend(run_experts(gpu, &x, &only, &slots, activation));
                    (left, rows) = (rest, rows - piece);
                }
            }
            all
        });
        let what = format!("{kernel:?} {hidden} x {width} {counts:?} {activation:?}, bias {bias}");
        same_bits(&what, &found, expected);
    }
}

fn kernels_agree_on_experts() {
    for (hidden, width) in [(256, 192), (136, 72), (64, 520)] {
        for case in [(Activation::SiluMul, false), (SWIGLU, true)] {
            agree_on_experts(hidden, width, &[0, 300, 0, 1, 77, 513, 0, 64], case, 1.0);
            agree_on_experts(hidden, width, &[17, 0, 1, 40, 130, 5, 0], case, 1.0);
            // Gates far beyond what an exponential can hold.
            agree_on_experts(hidden, width, &[17, 70, 0, 200], case, 150.0);
            agree_on_experts(hidden, width, &[700], case, 1.0);
            agree_on_experts(hidden, width, &[0, 0, 256, 0], case, 1.0);
        }
    }
}

fn kernels_agree_on_many_experts() {
    let mut numbers = Numbers::new(21);
    for most in [300, 60] {
        let counts: Vec<usize> = (0..150).map(|_| numbers.below(most).saturating_sub(most / 5)).collect();
        agree_on_experts(64, 32, &counts, (Activation::SiluMul, false), 1.0);
    }
    // Of a single step each, and more than a pair of blocks is told of before it must have forgotten the first.
    let counts: Vec<usize> = (0..400).map(|_| numbers.below(19)).collect();
    agree_on_experts(64, 384, &counts, (Activation::SiluMul, false), 1.0);
}
