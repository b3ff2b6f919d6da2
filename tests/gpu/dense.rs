//! Memory, norms, rotary embedding, elementwise updates.

use libtest_mimic::Trial;
use moeyard::backend::{AddNormArgs, AttentionBatch, DType, KvShape, NormArgs, RopeArgs, SeqSpan};
use moeyard::spec::NormKind;

use crate::pair::{CLOSE, EXACT, poisoned, same, tensor, tolerance, values};
use crate::support::numbers::Numbers;
use crate::trial;

const TYPES: [DType; 2] = [DType::F32, DType::Bf16];

pub fn trials() -> Vec<Trial> {
    vec![
        trial("dense::bytes_return_as_they_went", bytes_return_as_they_went),
        trial("dense::a_large_tensor_makes_the_round_trip", a_large_tensor_makes_the_round_trip),
        trial("dense::rows_are_copied_between_types_and_strides", rows_are_copied_between_types_and_strides),
        trial("dense::rows_are_gathered", rows_are_gathered),
        trial("dense::embedding", embedding),
        trial("dense::norms", norms),
        trial("dense::sums_and_their_norms", sums_and_their_norms),
        trial("dense::split_norms", split_norms),
        trial("dense::rope", rope),
        trial("dense::rope_on_the_way_to_the_cache", rope_on_the_way_to_the_cache),
        trial("dense::elementwise", elementwise),
    ]
}

fn bytes_return_as_they_went() {
    for dtype in [DType::F32, DType::Bf16, DType::I32] {
        for (rows, cols) in [(0, 3), (1, 1), (3, 5), (7, 64), (2, 1000)] {
            let data: Vec<f32> = (0..rows * (cols + 2)).map(|i| (i % 251) as f32).collect();
            same(&format!("{dtype:?} [{rows}, {cols}]"), EXACT, |device| {
                let wide = tensor(device, dtype, rows, cols + 2, &data);
                let mut seen = values(device, wide.view());
                seen.extend(values(device, wide.view().cols_range(1..cols + 1)));
                seen
            });
        }
    }
}

/// More than the ring that uploads go through.
fn a_large_tensor_makes_the_round_trip() {
    let (rows, cols) = (5000, 2049);
    let data: Vec<f32> = (0..rows * cols).map(|i| (i % 65521) as f32).collect();
    let owner = crate::pair::gpu();
    let gpu = owner.as_ref();
    let whole = tensor(gpu, DType::F32, rows, cols, &data);
    assert_eq!(values(gpu, whole.view()), data);
    let mut wide = poisoned(gpu, DType::F32, rows, cols + 3);
    let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
    gpu.upload(&bytes, wide.view_mut().cols_range(2..cols + 2)).unwrap();
    assert_eq!(values(gpu, wide.view().cols_range(2..cols + 2)), data);
    assert!(values(gpu, wide.view().cols_range(0..2)).iter().all(|x| x.is_nan()));
}

fn rows_are_copied_between_types_and_strides() {
    let mut numbers = Numbers::new(1);
    for from in TYPES {
        for to in TYPES {
            for (rows, cols, shift) in [(1, 1, 0), (5, 33, 1), (40, 128, 8), (3, 4096, 0)] {
                let data = numbers.vec(rows * (cols + 8));
                same(&format!("{from:?} to {to:?} [{rows}, {cols}]"), EXACT, |device| {
                    let src = tensor(device, from, rows, cols + 8, &data);
                    let mut dst = poisoned(device, to, rows, cols + 16);
                    let target = dst.view_mut().cols_range(8..8 + cols);
                    device.copy_rows(src.view().cols_range(shift..shift + cols), target).unwrap();
                    values(device, dst.view().cols_range(8..8 + cols))
                });
            }
        }
    }
    same("integers", EXACT, |device| {
        let src = tensor(device, DType::I32, 3, 7, &(0..21).map(|i| i as f32).collect::<Vec<_>>());
        let mut dst = poisoned(device, DType::I32, 3, 7);
        device.copy_rows(src.view(), dst.view_mut()).unwrap();
        values(device, dst.view())
    });
}

fn rows_are_gathered() {
    let mut numbers = Numbers::new(2);
    for dtype in TYPES {
        for (rows, cols, taken) in [(1, 7, 3), (50, 64, 200), (9, 2048, 1), (4, 8, 0)] {
            let data = numbers.vec(rows * cols);
            let index: Vec<u32> = (0..taken).map(|_| numbers.below(rows) as u32).collect();
            same(&format!("{taken} of [{rows}, {cols}] {dtype:?}"), EXACT, |device| {
                let src = tensor(device, dtype, rows, cols, &data);
                let mut dst = poisoned(device, dtype, taken, cols);
                device.gather_rows(src.view(), &index, dst.view_mut()).unwrap();
                values(device, dst.view())
            });
        }
    }
}

fn embedding() {
    let mut numbers = Numbers::new(3);
    for dtype in TYPES {
        let (vocab, hidden) = (97, 131);
        let table = numbers.vec(vocab * hidden);
        let ids: Vec<u32> = (0..40).map(|_| numbers.below(vocab) as u32).collect();
        same(&format!("{dtype:?}"), EXACT, |device| {
            let table = tensor(device, dtype, vocab, hidden, &table);
            let mut out = poisoned(device, DType::F32, ids.len(), hidden);
            device.embed(table.view(), &ids, 12.0, out.view_mut()).unwrap();
            values(device, out.view())
        });
    }
}

fn norms() {
    let mut numbers = Numbers::new(4);
    for kind in [NormKind::Rms, NormKind::Layer] {
        for (from, to) in [(DType::F32, DType::F32), (DType::F32, DType::Bf16), (DType::Bf16, DType::F32)] {
            for (rows, groups, width) in
                [(1, 1, 1), (3, 4, 16), (70, 1, 129), (5, 2, 1000), (2, 1, 7168), (0, 1, 8)]
            {
                let cols = groups * width;
                let data: Vec<f32> = (0..rows * cols).map(|_| numbers.unit() * 3.0 + 0.5).collect();
                let (weight, bias) = (numbers.vec(width), numbers.vec(width));
                for biased in [false, true] {
                    if biased && kind == NormKind::Rms {
                        continue;
                    }
                    same(
                        &format!("{kind:?} {from:?} {to:?} {rows} x {groups} x {width}"),
                        tolerance(to),
                        |device| {
                            let mut x = tensor(device, from, rows, cols, &data);
                            let weight = tensor(device, DType::F32, 1, width, &weight);
                            let bias = tensor(device, DType::F32, 1, width, &bias);
                            let args = NormArgs {
                                kind,
                                eps: 1e-5,
                                weight: weight.view(),
                                bias: biased.then(|| bias.view()),
                                width,
                            };
                            let mut out = poisoned(device, to, rows, cols);
                            device.norm(x.view(), args, out.view_mut()).unwrap();
                            let mut seen = values(device, out.view());
                            if from == to {
                                device.norm_inplace(x.view_mut(), args).unwrap();
                                seen.extend(values(device, x.view()));
                            }
                            seen
                        },
                    );
                }
            }
        }
    }
}

fn sums_and_their_norms() {
    let mut numbers = Numbers::new(8);
    for (rows, width) in [(1, 4096), (3, 64), (5, 1001), (2, 7168), (2, 9000), (70, 256)] {
        let (data, addend, weight) =
            (numbers.vec(rows * width), numbers.vec(rows * width), numbers.vec(width));
        for (added, exact) in [(false, false), (false, true), (true, false), (true, true)] {
            same(&format!("[{rows}, {width}] {added} {exact}"), tolerance(DType::Bf16), |device| {
                let mut x = tensor(device, DType::F32, rows, width, &data);
                let addend = tensor(device, DType::F32, rows, width, &addend);
                let weight = tensor(device, DType::F32, 1, width, &weight);
                let mut normed = poisoned(device, DType::F32, rows, width);
                let mut rounded = poisoned(device, DType::Bf16, rows, width);
                let norm =
                    NormArgs { kind: NormKind::Rms, eps: 1e-5, weight: weight.view(), bias: None, width };
                let args = AddNormArgs {
                    addend: added.then(|| (addend.view(), 0.5)),
                    norm,
                    exact: exact.then(|| normed.view_mut()),
                    rounded: rounded.view_mut(),
                };
                device.add_norm(x.view_mut(), args).unwrap();
                [x.view(), normed.view(), rounded.view()].map(|v| values(device, v)).concat()
            });
        }
    }
}

fn split_norms() {
    let mut numbers = Numbers::new(5);
    for (rows, cols) in [(1, 1), (9, 64), (3, 2049)] {
        let (data, weight) = (numbers.vec(rows * cols), numbers.vec(cols));
        same(&format!("[{rows}, {cols}]"), CLOSE, |device| {
            let mut x = tensor(device, DType::F32, rows, cols, &data);
            let weight = tensor(device, DType::F32, 1, cols, &weight);
            let mut sums = poisoned(device, DType::F32, rows, 1);
            device.square_sum(x.view(), sums.view_mut()).unwrap();
            device.scale_by_square_sum(sums.view(), 2 * cols, 1e-6, weight.view(), x.view_mut()).unwrap();
            [values(device, sums.view()), values(device, x.view())].concat()
        });
    }
}

fn rope() {
    let mut numbers = Numbers::new(6);
    for interleaved in [false, true] {
        for (rows, heads, stride, offset, dim) in
            [(1, 1, 2, 0, 2), (7, 3, 24, 8, 16), (33, 5, 64, 0, 20), (4, 40, 128, 0, 128)]
        {
            let (data, table) = (numbers.vec(rows * (heads * stride + 3)), numbers.vec(50 * dim));
            let positions: Vec<u32> = (0..rows).map(|_| numbers.below(50) as u32).collect();
            same(&format!("{rows} x {heads} x {stride}, {offset} + {dim}"), CLOSE, |device| {
                let mut x = tensor(device, DType::F32, rows, heads * stride + 3, &data);
                let table = tensor(device, DType::F32, 50, dim, &table);
                let args = RopeArgs {
                    table: table.view(),
                    rows: &positions,
                    heads,
                    head_stride: stride,
                    offset,
                    dim,
                    interleaved,
                };
                device.rope(x.view_mut().cols_range(1..heads * stride + 2), args).unwrap();
                values(device, x.view())
            });
        }
    }
}

fn rope_on_the_way_to_the_cache() {
    let mut numbers = Numbers::new(9);
    for (dtype, interleaved) in [(DType::F32, false), (DType::Bf16, false), (DType::Bf16, true)] {
        for (rows, queries, kv_heads, head_dim, offset, dim) in
            [(1, 32, 8, 128, 0, 128), (5, 4, 2, 16, 0, 8), (40, 3, 1, 24, 4, 16), (3, 2, 2, 64, 0, 64)]
        {
            let cols = (queries + 2 * kv_heads) * head_dim;
            let (data, table) = (numbers.vec(rows * cols), numbers.vec(50 * dim));
            let positions: Vec<u32> = (0..rows as u32).map(|row| row + 3).collect();
            let spans = [SeqSpan { row: 0, rows: rows as u32, position: 3, prompt_len: 9, first_block: 1 }];
            let what = format!("{dtype:?} {rows} x ({queries} + {kv_heads}) x {head_dim}, {offset} + {dim}");
            same(&what, tolerance(dtype), |device| {
                let mut qkv = tensor(device, DType::F32, rows, cols, &data);
                let table = tensor(device, DType::F32, 50, dim, &table);
                let shape = KvShape::Gqa { kv_heads, head_dim };
                let mut cache = device.alloc_kv(shape, dtype, 16, 4).unwrap();
                let rope = RopeArgs {
                    table: table.view(),
                    rows: &positions,
                    heads: queries + kv_heads,
                    head_stride: head_dim,
                    offset,
                    dim,
                    interleaved,
                };
                let batch = AttentionBatch { spans: &spans, block_table: &[0, 3, 1, 2] };
                device.rope_kv_write(qkv.view_mut(), rope, batch, &mut cache).unwrap();
                let queries = qkv.view().cols_range(0..queries * head_dim);
                // Both backends keep tokens in cache order.
                [queries, cache.parts[0].view(), cache.parts[1].view()].map(|v| values(device, v)).concat()
            });
        }
    }
}

fn elementwise() {
    let mut numbers = Numbers::new(7);
    for (rows, cols) in [(1, 1), (6, 100), (300, 65), (2, 8192)] {
        let (x, y, gate) = (numbers.vec(rows * cols), numbers.vec(rows * cols), numbers.vec(rows));
        for dtype in TYPES {
            same(&format!("[{rows}, {cols}] {dtype:?}"), CLOSE, |device| {
                let mut x = tensor(device, dtype, rows, cols, &x);
                let mut y = tensor(device, DType::F32, rows, cols, &y);
                let gate = tensor(device, DType::F32, rows, 1, &gate);
                device.add_scaled(x.view(), 0.22, y.view_mut()).unwrap();
                device.sigmoid_gate(gate.view(), y.view_mut()).unwrap();
                device.scale(1.5, y.view_mut()).unwrap();
                device.clamp(0.5, y.view_mut()).unwrap();
                device.clamp(0.25, x.view_mut()).unwrap();
                [values(device, y.view()), values(device, x.view())].concat()
            });
        }
    }
}
