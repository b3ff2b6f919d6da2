//! Experts in fp8 and in 4 bits: the bits of a run whose experts hold the same numbers in bf16, in products and in whole models.

use std::path::Path;

use libtest_mimic::Trial;
use moeyard::backend::{DType, HostData, HostMatrix, HostMlp, HostMlpBias, Mlp};
use moeyard::spec::Activation;

use crate::pair::{Device, ROUNDED, gpu, poisoned, same, tensor, values};
use crate::products::{SWIGLU, host_mlp, run_experts, same_bits};
use crate::support::numbers::Numbers;
use crate::support::rounded::rounded_copy;
use crate::support::{Setup, World};
use crate::trial;

const FORMS: [DType; 2] = [DType::F8, DType::I4x2];

pub fn trials() -> Vec<Trial> {
    vec![
        trial("quantized::kernels_agree_on_experts", kernels_agree_on_experts),
        trial("quantized::kernels_agree_on_many_experts", kernels_agree_on_many_experts),
        trial("quantized::mlp", mlp),
        trial("quantized::near_the_reference", near_the_reference),
        trial("quantized::footprints_are_what_is_allocated", footprints_are_what_is_allocated),
        trial("quantized::codes_travel_as_they_are", codes_travel_as_they_are),
        trial(
            "quantized::whole_models_are_those_with_their_numbers",
            whole_models_are_those_with_their_numbers,
        ),
    ]
}

/// The numbers that the codes of each matrix stand for, in bf16.
fn rounded(mlp: &HostMlp<'_>, dtype: DType) -> HostMlp<'static> {
    let round = |m: &HostMatrix<'_>| {
        let data = HostData::Bf16(m.quantized(dtype).weights().into());
        HostMatrix { n: m.n, k: m.k, data }
    };
    let bias = mlp.bias.as_ref().map(|HostMlpBias { gate, up, down }| HostMlpBias {
        gate: gate.clone(),
        up: up.clone(),
        down: down.clone(),
    });
    HostMlp { gate: round(&mlp.gate), up: round(&mlp.up), down: round(&mlp.down), bias }
}

/// Codes against the numbers that they stand for in bf16, by the best kernels of this GPU.
fn agree(
    gpu: Device<'_>,
    dtype: DType,
    (hidden, width): (usize, usize),
    counts: &[usize],
    (activation, bias): (Activation, bool),
) {
    let mut numbers = Numbers::new(41);
    let host: Vec<HostMlp> =
        counts.iter().map(|_| host_mlp(&mut numbers, hidden, width, bias, DType::F32)).collect();
    let rows: usize = counts.iter().sum();
    let x = tensor(gpu, DType::Bf16, rows, hidden, &numbers.vec(rows * hidden));
    // A slot without rows is empty now and then.
    let slots = |pack: &dyn Fn(&HostMlp<'_>) -> Mlp| -> Vec<Option<Mlp>> {
        (0..counts.len()).map(|s| (counts[s] > 0 || s % 2 == 0).then(|| pack(&host[s]))).collect()
    };
    let run = |slots: &[Option<Mlp>]| run_experts(gpu, &x, counts, slots, activation);
    let expected = run(&slots(&|mlp| gpu.pack_mlp(&rounded(mlp, dtype), DType::Bf16).unwrap()));
    let found = run(&slots(&|mlp| gpu.pack_mlp(mlp, dtype).unwrap()));
    same_bits(
        &format!("{dtype:?} {hidden} x {width} {counts:?} {activation:?}, bias {bias}"),
        &found,
        &expected,
    );
}

fn kernels_agree_on_experts() {
    let owner = gpu();
    let gpu = owner.as_ref();
    let loads: [&[usize]; 9] = [
        &[0, 0, 0],
        &[1, 0, 0],
        &[0, 1, 2],
        &[9, 0, 17],
        &[33, 20, 0],
        &[64, 65, 0],
        &[0, 0, 200],
        &[700, 0, 1],
        &[3, 300, 77, 0, 5],
    ];
    for dtype in FORMS {
        // Less than a tile, several, and widths that no tile divides.
        for shape in [(8, 8), (24, 20), (136, 72), (256, 192), (264, 200), (64, 1032), (1032, 17)] {
            for case in [(Activation::SiluMul, false), (SWIGLU, true)] {
                for counts in loads {
                    agree(gpu, dtype, shape, counts, case);
                }
            }
        }
        // Enough tiles for the wide ones.
        for rows in [1, 12, 30, 60, 128] {
            agree(gpu, dtype, (256, 1024), &[rows; 40], (Activation::SiluMul, false));
        }
    }
}

fn kernels_agree_on_many_experts() {
    let owner = gpu();
    let gpu = owner.as_ref();
    let mut numbers = Numbers::new(42);
    for dtype in FORMS {
        for most in [300, 60, 4] {
            let counts: Vec<usize> = (0..150).map(|_| numbers.below(most).saturating_sub(most / 5)).collect();
            agree(gpu, dtype, (136, 40), &counts, (Activation::SiluMul, false));
        }
    }
}

/// A shared expert: one matrix for all rows, which may be strided.
fn mlp() {
    let owner = gpu();
    let gpu = owner.as_ref();
    let mut numbers = Numbers::new(43);
    for dtype in FORMS {
        for rows in [1, 7, 40, 130] {
            let (hidden, width) = (136, 100);
            let host = host_mlp(&mut numbers, hidden, width, rows % 2 == 0, DType::Bf16);
            let x = tensor(gpu, DType::Bf16, rows, hidden + 8, &numbers.vec(rows * (hidden + 8)));
            let run = |mlp: Mlp| {
                let mut out = poisoned(gpu, DType::F32, rows, hidden);
                gpu.mlp(x.view().cols_range(0..hidden), &mlp, Activation::SiluMul, out.view_mut()).unwrap();
                values(gpu, out.view())
            };
            let expected = run(gpu.pack_mlp(&rounded(&host, dtype), DType::Bf16).unwrap());
            same_bits(
                &format!("{dtype:?} {rows} rows"),
                &run(gpu.pack_mlp(&host, dtype).unwrap()),
                &expected,
            );
        }
    }
}

fn near_the_reference() {
    let mut numbers = Numbers::new(44);
    for dtype in FORMS {
        let host = host_mlp(&mut numbers, 264, 152, true, DType::Bf16);
        let x = numbers.vec(37 * 264);
        same(&format!("{dtype:?}"), ROUNDED, |device| {
            let slots = [None, Some(device.pack_mlp(&host, dtype).unwrap())];
            run_experts(device, &tensor(device, DType::Bf16, 37, 264, &x), &[0, 37], &slots, SWIGLU)
        });
    }
}

fn footprints_are_what_is_allocated() {
    let owner = gpu();
    let gpu = owner.as_ref();
    let mut numbers = Numbers::new(45);
    for dtype in FORMS {
        for bias in [false, true] {
            let mlp = host_mlp(&mut numbers, 264, 21, bias, DType::F32);
            assert_eq!(gpu.pack_mlp(&mlp, dtype).unwrap().bytes(), gpu.mlp_bytes(264, 21, bias, dtype));
        }
    }
}

/// Pieces of any size, as experts move between ranks.
fn codes_travel_as_they_are() {
    let owner = gpu();
    let gpu = owner.as_ref();
    for dtype in FORMS {
        let bytes: Vec<u8> = (0..5000u32).map(|i| (i * 7 + i / 256) as u8).collect();
        let mut from = gpu.alloc(dtype, 1, bytes.len()).unwrap();
        gpu.upload(&bytes, from.view_mut()).unwrap();
        for range in [0..5000, 64..4096, 128..131, 64..4999] {
            let mut to = gpu.alloc(dtype, 1, 5000).unwrap();
            gpu.copy_rows(from.view().cols_range(range.clone()), to.view_mut().cols_range(range.clone()))
                .unwrap();
            let mut found = vec![0; 5000];
            gpu.download(to.view(), &mut found).unwrap();
            let expected: Vec<u8> =
                (0..5000).map(|i| if range.contains(&i) { bytes[i] } else { 0 }).collect();
            assert!(found == expected, "{dtype:?} {range:?}");
        }
    }
}

/// On one rank, which groups rows on the device, and on two.
fn whole_models_are_those_with_their_numbers() {
    let tokens: Vec<u32> = (0..70).map(|i| (i * 389 + 7) % 4096).collect();
    for model in ["models/demo-mixtral", "models/demo-deepseek"] {
        for dtype in FORMS {
            let copy = rounded_copy(Path::new(model), dtype);
            for ep in [1, 2] {
                let run = |folder: &Path, experts: Option<DType>| {
                    let backend = std::sync::Arc::new(gpu);
                    let setup = Setup { experts, backend, ..Setup::expert_parallel(DType::Bf16, ep) };
                    World::load(folder, &setup).generate(&tokens, 8).0.concat()
                };
                let expected = run(copy.path(), None);
                same_bits(
                    &format!("{model} {dtype:?}, EP {ep}"),
                    &run(Path::new(model), Some(dtype)),
                    &expected,
                );
                assert!(run(Path::new(model), None) != expected, "{model} {dtype:?}: nothing was quantised");
            }
        }
    }
}
