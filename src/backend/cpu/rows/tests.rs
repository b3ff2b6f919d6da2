//! The small operations on every instruction set: close to the reference, and with the same bits in any batch.

use crate::backend::cpu::CpuBackend;
use crate::backend::cpu::simd::Isa;
use crate::backend::reference::ReferenceBackend;
use crate::backend::{Backend, CombineArgs, DType, NormArgs, RopeArgs, Tensor};
use crate::spec::{ExpertGroups, GroupScore, NormKind, Renormalize, Router, Score};

/// Uniform in -4..4; a function of its arguments alone.
fn random(stream: u64, index: u64) -> f32 {
    let mut x = stream.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index.wrapping_mul(0xd134_2543_de82_ef95);
    for _ in 0..2 {
        x = (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    (x >> 40) as f32 / (1u64 << 21) as f32 - 4.0
}

/// `[rows, cols]` of random numbers.
fn tensor(backend: &dyn Backend, stream: u64, (rows, cols): (usize, usize), dtype: DType) -> Tensor {
    let data: Vec<f32> = (0..rows * cols).map(|i| random(stream, i as u64)).collect();
    let mut f32s = backend.alloc(DType::F32, rows, cols).unwrap();
    backend.upload(bytemuck::cast_slice(&data), f32s.view_mut()).unwrap();
    let mut out = backend.alloc(dtype, rows, cols).unwrap();
    backend.copy_rows(f32s.view(), out.view_mut()).unwrap();
    out
}

fn floats(backend: &dyn Backend, x: &Tensor) -> Vec<f32> {
    let mut f32s = backend.alloc(DType::F32, x.rows(), x.cols()).unwrap();
    backend.copy_rows(x.view(), f32s.view_mut()).unwrap();
    let mut host = vec![0.0f32; x.rows() * x.cols()];
    backend.download(f32s.view(), bytemuck::cast_slice_mut(&mut host)).unwrap();
    host
}

fn ints(backend: &dyn Backend, x: &Tensor) -> Vec<i32> {
    let mut host = vec![0i32; x.rows() * x.cols()];
    backend.download(x.view(), bytemuck::cast_slice_mut(&mut host)).unwrap();
    host
}

/// Runs a case on the reference and on every instruction set, and compares.
#[track_caller]
fn check(what: &str, tolerance: f32, case: impl Fn(&dyn Backend) -> Vec<f32>) {
    let expected = case(&ReferenceBackend);
    for isa in Isa::available() {
        let found: Vec<_> = [1, 3].map(|threads| case(&CpuBackend::new(threads, isa).unwrap())).into();
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found[0]), bits(&found[1]), "{what} on {}: threads", isa.name());
        assert_eq!(found[0].len(), expected.len(), "{what}: elements");
        for (i, (f, e)) in found[0].iter().zip(&expected).enumerate() {
            assert!(
                (f - e).abs() <= tolerance * e.abs().max(1.0),
                "{what} on {}: element {i} is {f}, expected {e}",
                isa.name()
            );
        }
    }
}

const SHAPES: [(usize, usize); 6] = [(1, 1), (3, 7), (2, 16), (5, 33), (40, 1000), (0, 8)];
const FLOATS: [DType; 2] = [DType::F32, DType::Bf16];
/// One rounding to bf16 may fall to the other side.
const BF16: f32 = 1.0 / 128.0;

#[test]
fn elementwise_operations() {
    for shape in SHAPES {
        for dtype in FLOATS {
            check("copy", 0.0, |b| {
                let x = tensor(b, 1, shape, DType::F32);
                let mut y = tensor(b, 2, shape, dtype);
                b.copy_rows(x.view(), y.view_mut()).unwrap();
                floats(b, &y)
            });
            check("add_scaled", 1e-6, |b| {
                let x = tensor(b, 1, shape, dtype);
                let mut y = tensor(b, 2, shape, DType::F32);
                b.add_scaled(x.view(), 0.3, y.view_mut()).unwrap();
                floats(b, &y)
            });
            check("clamp", 0.0, |b| {
                let mut x = tensor(b, 1, shape, dtype);
                b.clamp(1.5, x.view_mut()).unwrap();
                floats(b, &x)
            });
        }
        check("scale", 0.0, |b| {
            let mut x = tensor(b, 1, shape, DType::F32);
            b.scale(0.3, x.view_mut()).unwrap();
            floats(b, &x)
        });
        check("sigmoid_gate", 1e-6, |b| {
            let gate = tensor(b, 1, (shape.0, 1), DType::F32);
            let mut x = tensor(b, 2, shape, DType::F32);
            b.sigmoid_gate(gate.view(), x.view_mut()).unwrap();
            floats(b, &x)
        });
    }
}

#[test]
fn rows_by_index() {
    let index = [4, 0, 0, 6, 3];
    for dtype in FLOATS {
        for cols in [1, 19, 64, 5000] {
            check("embed", 0.0, |b| {
                let table = tensor(b, 1, (7, cols), dtype);
                let mut out = tensor(b, 2, (5, cols), DType::F32);
                b.embed(table.view(), &index, 12.0, out.view_mut()).unwrap();
                floats(b, &out)
            });
            check("gather", 0.0, |b| {
                let rows = tensor(b, 1, (7, cols), dtype);
                let mut out = tensor(b, 2, (5, cols), dtype);
                b.gather_rows(rows.view(), &index, out.view_mut()).unwrap();
                floats(b, &out)
            });
            check("combine", 1e-5, |b| {
                let rows = tensor(b, 1, (9, cols), dtype);
                let weights = tensor(b, 2, (2, 3), DType::F32);
                let index = [8, 0, 1, 1, 7, 2, 3, 4, 5, 6, 0, 8];
                let mut out = tensor(b, 3, (2, cols), DType::F32);
                let args =
                    CombineArgs { rows: rows.view(), index: &index, weights: weights.view(), parts: 2 };
                b.combine(args, out.view_mut()).unwrap();
                floats(b, &out)
            });
        }
    }
}

#[test]
fn strided_views_leave_the_gaps_alone() {
    for dtype in FLOATS {
        check("columns", 0.0, |b| {
            let mut x = tensor(b, 1, (4, 50), dtype);
            b.clamp(0.5, x.view_mut().cols_range(3..20)).unwrap();
            let y = tensor(b, 2, (4, 50), DType::F32);
            b.copy_rows(y.view().cols_range(10..20), x.view_mut().cols_range(30..40)).unwrap();
            floats(b, &x)
        });
    }
}

#[test]
fn norms() {
    for (kind, width) in
        [(NormKind::Rms, 8), (NormKind::Rms, 100), (NormKind::Layer, 50), (NormKind::Layer, 9)]
    {
        for (from, to) in [(DType::F32, DType::F32), (DType::F32, DType::Bf16), (DType::Bf16, DType::Bf16)] {
            let tolerance = if to == DType::F32 { 1e-5 } else { BF16 };
            let cols = width * 3;
            let case = |b: &dyn Backend, inplace: bool| {
                let mut x = tensor(b, 1, (33, cols), from);
                let weight = tensor(b, 2, (1, width), DType::F32);
                let bias = tensor(b, 3, (1, width), DType::F32);
                let bias = (kind == NormKind::Layer).then(|| bias.view());
                let args = NormArgs { kind, eps: 1e-5, weight: weight.view(), bias, width };
                if inplace {
                    b.norm_inplace(x.view_mut(), args).unwrap();
                    return floats(b, &x);
                }
                let mut out = b.alloc(to, 33, cols).unwrap();
                b.norm(x.view(), args, out.view_mut()).unwrap();
                floats(b, &out)
            };
            check("norm", tolerance, |b| case(b, false));
            check("norm_inplace", if from == DType::F32 { 1e-5 } else { BF16 }, |b| case(b, true));
        }
    }
    for dtype in FLOATS {
        check("split norm", if dtype == DType::F32 { 1e-5 } else { BF16 }, |b| {
            let mut x = tensor(b, 1, (5, 77), dtype);
            let weight = tensor(b, 2, (1, 77), DType::F32);
            let mut sums = b.alloc(DType::F32, 5, 1).unwrap();
            b.square_sum(x.view(), sums.view_mut()).unwrap();
            b.scale_by_square_sum(sums.view(), 154, 1e-6, weight.view(), x.view_mut()).unwrap();
            floats(b, &x)
        });
    }
}

#[test]
fn rope_of_both_layouts() {
    for dtype in FLOATS {
        for (dim, head_stride, offset) in [(2, 2, 0), (16, 16, 0), (20, 30, 0), (64, 192, 128), (6, 20, 14)] {
            for interleaved in [false, true] {
                check("rope", if dtype == DType::F32 { 1e-5 } else { 2.0 * BF16 }, |b| {
                    let table = tensor(b, 1, (9, dim), DType::F32);
                    let mut x = tensor(b, 2, (4, 3 * head_stride + 5), dtype);
                    let args = RopeArgs {
                        table: table.view(),
                        rows: &[8, 0, 3, 3],
                        heads: 3,
                        head_stride,
                        offset,
                        dim,
                        interleaved,
                    };
                    b.rope(x.view_mut(), args).unwrap();
                    floats(b, &x)
                });
            }
        }
    }
}

#[test]
fn routers() {
    let groups = |count, keep, score| Some(ExpertGroups { count, keep, score });
    for (score, groups, choice_bias) in [
        (Score::Softmax, None, false),
        (Score::Sigmoid, None, true),
        (Score::Softmax, groups(4, 2, GroupScore::Max), false),
        (Score::Sigmoid, groups(6, 3, GroupScore::Top2Sum), true),
        (Score::Sigmoid, groups(24, 12, GroupScore::Top2Sum), true),
        (Score::SoftmaxOverChosen, None, false),
        (Score::SparseMixer { epsilon: 0.01 }, None, false),
    ] {
        for renormalize in [Renormalize::Off, Renormalize::Sum { eps: 1e-20 }] {
            for top_k in [1, 2, 3, 6] {
                let router =
                    Router { score, logit_bias: false, choice_bias, groups, renormalize, scale: 2.5 };
                check(&format!("{router:?} top {top_k}"), 1e-5, |b| {
                    let logits = tensor(b, 1, (300, 24), DType::F32);
                    let bias = tensor(b, 2, (1, 24), DType::F32);
                    let mut ids = b.alloc(DType::I32, 300, top_k).unwrap();
                    let mut weights = b.alloc(DType::F32, 300, top_k).unwrap();
                    let bias = choice_bias.then(|| bias.view());
                    b.route(logits.view(), bias, &router, ids.view_mut(), weights.view_mut()).unwrap();
                    let ids = ints(b, &ids).into_iter().map(|id| id as f32);
                    ids.chain(floats(b, &weights)).collect()
                });
            }
        }
    }
}

#[test]
fn equal_scores_choose_the_lowest_ids() {
    for score in
        [Score::Softmax, Score::Sigmoid, Score::SoftmaxOverChosen, Score::SparseMixer { epsilon: 0.1 }]
    {
        let renormalize = Renormalize::Off;
        let router =
            Router { score, logit_bias: false, choice_bias: false, groups: None, renormalize, scale: 1.0 };
        for isa in Isa::available() {
            let b = CpuBackend::new(1, isa).unwrap();
            let logits = b.alloc(DType::F32, 1, 21).unwrap();
            let mut ids = b.alloc(DType::I32, 1, 5).unwrap();
            let mut weights = b.alloc(DType::F32, 1, 5).unwrap();
            b.route(logits.view(), None, &router, ids.view_mut(), weights.view_mut()).unwrap();
            assert_eq!(ints(&b, &ids), [0, 1, 2, 3, 4], "{score:?} on {}", isa.name());
        }
    }
}
