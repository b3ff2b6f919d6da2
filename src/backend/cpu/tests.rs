//! Matrix products and experts on every instruction set of this machine: against plain loops in f64, and against themselves
//! in other batches, bit for bit.

use half::bf16;

use super::memory::{Element, Rows, RowsMut};
use super::simd::{Float, Isa};
use super::{CpuBackend, experts, gemm, memory};
use crate::backend::{
    Backend, DType, ExpertsArgs, HostData, HostMatrix, HostMlp, HostMlpBias, Mlp, Precision, SharedArgs,
    Tensor, View,
};
use crate::spec::Activation;

/// A reproducible stream of numbers in (-1, 1) with many different bits.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
    /// `[n, k]` of a given type, values of the size trained weights have.
    fn matrix(&mut self, n: usize, k: usize, dtype: DType) -> HostMatrix<'static> {
        let data = self.vec(n * k).into_iter().map(|x| x / (k as f32).sqrt());
        let data = match dtype {
            DType::Bf16 => HostData::Bf16(data.map(bf16::from_f32).collect()),
            _ => HostData::F32(data.collect()),
        };
        HostMatrix { n, k, data }
    }
    /// Activations of a given type.
    fn tensor(&mut self, rows: usize, cols: usize, dtype: DType) -> Tensor {
        let mut t = memory::tensor(dtype, rows, cols).unwrap();
        match dtype {
            DType::F32 => self.fill::<f32>(&mut t),
            _ => self.fill::<bf16>(&mut t),
        }
        t
    }
    fn fill<T: Element + Float>(&mut self, t: &mut Tensor) {
        let mut rows = RowsMut::<T>::new(t.view_mut());
        for r in 0..rows.rows() {
            rows.row_mut(r).fill_with(|| T::from_f32(self.next()));
        }
    }
    /// Activations with NaN on both sides: `[rows, cols]` from column [`ASIDE`] on.
    fn amid_nan(&mut self, rows: usize, cols: usize, dtype: DType) -> Tensor {
        let inside = self.tensor(rows, cols, dtype);
        let mut wide = memory::tensor(dtype, rows, cols + 2 * ASIDE).unwrap();
        match dtype {
            DType::F32 => spread(&Rows::<f32>::new(inside.view()), &mut RowsMut::new(wide.view_mut()), ASIDE),
            _ => spread(&Rows::<bf16>::new(inside.view()), &mut RowsMut::new(wide.view_mut()), ASIDE),
        }
        wide
    }
    fn mlp(&mut self, hidden: usize, intermediate: usize, bias: bool, dtype: DType) -> HostMlp<'static> {
        HostMlp {
            gate: self.matrix(intermediate, hidden, dtype),
            up: self.matrix(intermediate, hidden, dtype),
            down: self.matrix(hidden, intermediate, dtype),
            bias: bias.then(|| HostMlpBias {
                gate: self.vec(intermediate),
                up: self.vec(intermediate),
                down: self.vec(hidden),
            }),
        }
    }
}

/// Columns on each side of [`Noise::amid_nan`].
const ASIDE: usize = 3;

/// Copies rows into wider ones, from a column on; the rest becomes NaN.
fn spread<T: Float>(rows: &Rows<'_, T>, wide: &mut RowsMut<'_, T>, column: usize) {
    for r in 0..rows.rows() {
        wide.row_mut(r).fill(T::from_f32(f32::NAN));
        wide.row_mut(r)[column..][..rows.cols()].copy_from_slice(rows.row(r));
    }
}

/// The same rows, so many elements apart, with NaN between them.
fn apart(rows: &Tensor, pitch: usize) -> Tensor {
    let mut wide = memory::tensor(rows.dtype(), rows.rows(), pitch).unwrap();
    match rows.dtype() {
        DType::F32 => spread(&Rows::<f32>::new(rows.view()), &mut RowsMut::new(wide.view_mut()), 0),
        _ => spread(&Rows::<bf16>::new(rows.view()), &mut RowsMut::new(wide.view_mut()), 0),
    }
    wide
}

/// One row as f64.
fn row(view: View<'_>, r: usize) -> Vec<f64> {
    match view.dtype() {
        DType::F32 => Rows::<f32>::new(view).row(r).iter().map(|&x| f64::from(x)).collect(),
        _ => Rows::<bf16>::new(view).row(r).iter().map(|&x| f64::from(x.to_f32())).collect(),
    }
}

/// The bits of one row.
fn bits(view: View<'_>, r: usize) -> Vec<u32> {
    row(view, r).into_iter().map(|x| (x as f32).to_bits()).collect()
}

/// Element [j, k] of a matrix as packed for `dtype`.
fn weight(m: &HostMatrix<'_>, j: usize, k: usize, dtype: DType) -> f64 {
    let x = match &m.data {
        HostData::F32(data) => data[j * m.k + k],
        HostData::Bf16(data) => data[j * m.k + k].to_f32(),
        HostData::Quantized(_) => unreachable!("these tests quantise nothing"),
    };
    f64::from(if dtype == DType::Bf16 { bf16::from_f32(x).to_f32() } else { x })
}

/// `w x + bias` and the sum of the magnitudes of its terms, in f64.
fn plain_linear(x: &[f64], w: &HostMatrix<'_>, bias: Option<&[f32]>, dtype: DType) -> Vec<(f64, f64)> {
    (0..w.n)
        .map(|j| {
            let terms = x.iter().enumerate().map(|(k, x)| x * weight(w, j, k, dtype));
            let bias = bias.map_or(0.0, |b| f64::from(b[j]));
            terms.fold((bias, bias.abs()), |(sum, size), t| (sum + t, size + t.abs()))
        })
        .collect()
}

/// Backends of every instruction set, with one thread and with several.
fn backends() -> Vec<CpuBackend> {
    let isas = Isa::available().into_iter();
    isas.flat_map(|isa| [1, 3].map(|threads| CpuBackend::new(threads, isa).unwrap())).collect()
}

#[test]
fn linear_is_the_plain_sum() {
    let mut noise = Noise(1);
    for backend in backends() {
        for precision @ Precision { weights, activations, .. } in Precision::ALL {
            for (m, n, k) in [
                (1, 1, 1),
                (2, 5, 1),
                (1, 48, 2),
                (3, 49, 3),
                (7, 97, 130),
                (13, 33, 257),
                (9, 70, 128),
                (31, 100, 300),
                (2, 3, 0),
            ] {
                for (out_type, with_bias) in [(DType::F32, true), (DType::Bf16, false)] {
                    let host = noise.matrix(n, k, weights);
                    let packed = gemm::pack_matrix(&backend, &host, weights).unwrap();
                    assert_eq!(packed.data.bytes(), gemm::matrix_bytes(&backend, n, k, weights));
                    // Views inside wider matrices, whose other columns must neither count nor change.
                    let x = noise.amid_nan(m, k, activations);
                    let x = x.view().cols_range(ASIDE..ASIDE + k);
                    let mut bias = memory::tensor(DType::F32, 1, n).unwrap();
                    noise.fill::<f32>(&mut bias);
                    let bias = with_bias.then_some(&bias);
                    let mut out = noise.tensor(m, n + 9, out_type);
                    let before: Vec<_> = (0..m).map(|r| bits(out.view(), r)).collect();
                    let to = out.view_mut().cols_range(4..4 + n);
                    gemm::linear(&backend, x, &packed, bias.map(Tensor::view), to).unwrap();
                    for (r, before) in before.iter().enumerate() {
                        let got = row(out.view(), r);
                        let bias = bias.map(|b| Rows::<f32>::new(b.view()).row(0));
                        let want = plain_linear(&row(x, r), &host, bias, weights);
                        for (j, (want, size)) in want.into_iter().enumerate() {
                            let rounding = if out_type == DType::Bf16 { 1.0 / 256.0 } else { 1e-7 };
                            let limit = want.abs() * rounding + size * 1e-6;
                            let error = (got[4 + j] - want).abs();
                            assert!(
                                error <= limit,
                                "{} {precision:?} {m}x{n}x{k} [{r},{j}]: {error}",
                                backend.describe()
                            );
                        }
                        let after = bits(out.view(), r);
                        assert_eq!((&after[..4], &after[4 + n..]), (&before[..4], &before[4 + n..]));
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    let mut noise = Noise(2);
    // Last panels of 16 and of 32 columns; rows that are copied first, and rows that can be used where they are.
    let cases =
        Precision::ALL.into_iter().flat_map(|precision| [(precision, 101, 301), (precision, 125, 302)]);
    for (precision @ Precision { weights, activations, .. }, n, k) in cases {
        let host = noise.matrix(n, k, weights);
        let numbers = noise.tensor(530, k, activations);
        for isa in Isa::available() {
            let [one, three] = [1, 3].map(|threads| CpuBackend::new(threads, isa).unwrap());
            let x = apart(&numbers, one.row_pitch(activations, k));
            let x = x.view().cols_range(0..k);
            let packed = gemm::pack_matrix(&one, &host, weights).unwrap();
            let alone: Vec<_> = (0..530)
                .map(|r| {
                    let mut out = memory::tensor(DType::F32, 1, n).unwrap();
                    gemm::linear(&one, x.rows_range(r..r + 1), &packed, None, out.view_mut()).unwrap();
                    bits(out.view(), 0)
                })
                .collect();
            for m in (1..=130).chain([240, 241, 530]) {
                for backend in [&one, &three] {
                    // Not from the first row: a row's place in the batch differs too.
                    let first = (530 - m).min(m * 7 % 11);
                    let mut out = memory::tensor(DType::F32, m, n).unwrap();
                    let rows = x.rows_range(first..first + m);
                    gemm::linear(backend, rows, &packed, None, out.view_mut()).unwrap();
                    for r in 0..m {
                        assert_eq!(
                            bits(out.view(), r),
                            alone[first + r],
                            "{} {precision:?} row {r} of {m}",
                            isa.name()
                        );
                    }
                }
            }
        }
    }
}

/// The MLP of one row in f64, rounding between the matrices as the backend must, and a bound of what f32 sums may add.
fn plain_mlp(x: &[f64], w: &HostMlp<'_>, activation: Activation, dtype: DType) -> Vec<(f64, f64)> {
    let bias = w.bias.as_ref();
    let gate = plain_linear(x, &w.gate, bias.map(|b| &b.gate[..]), dtype);
    let up = plain_linear(x, &w.up, bias.map(|b| &b.up[..]), dtype);
    let between: Vec<f64> =
        gate.iter().zip(&up).map(|(&(gate, _), &(up, _))| activate(activation, gate, up)).collect();
    plain_linear(&between, &w.down, bias.map(|b| &b.down[..]), dtype)
}

fn activate(activation: Activation, gate: f64, up: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::SiluMul => gate * sigmoid(gate) * up,
        Activation::ClampedSwiglu { limit, alpha } => {
            let (limit, alpha) = (f64::from(limit), f64::from(alpha));
            let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
            gate * sigmoid(alpha * gate) * (up + 1.0)
        }
    }
}

/// Low enough for the clamps to bite.
const CLAMPED: Activation = Activation::ClampedSwiglu { limit: 0.7, alpha: 1.702 };

#[test]
fn experts_are_plain_mlps() {
    let mut noise = Noise(3);
    for backend in backends() {
        for precision @ Precision { weights, activations, .. } in Precision::ALL {
            for (hidden, intermediate) in [(1, 1), (33, 47), (64, 49), (50, 131)] {
                for (activation, bias) in [(Activation::SiluMul, false), (CLAMPED, true)] {
                    let hosts: Vec<_> =
                        (0..3).map(|_| noise.mlp(hidden, intermediate, bias, weights)).collect();
                    let slots: Vec<_> = hosts
                        .iter()
                        .map(|h| Some(experts::pack_mlp(&backend, h, weights).unwrap()))
                        .collect();
                    let bytes: usize = slots[0].as_ref().unwrap().parts.iter().map(Tensor::bytes).sum();
                    assert_eq!(bytes, experts::mlp_bytes(&backend, hidden, intermediate, bias, weights));
                    let offsets = [0, 2, 2, 19];
                    let rows = noise.tensor(19, hidden, activations);
                    let mut out = memory::tensor(DType::F32, 19, hidden).unwrap();
                    let args =
                        ExpertsArgs { rows: rows.view(), offsets: &offsets, slots: &slots, activation };
                    experts::experts(&backend, args, out.view_mut()).unwrap();
                    for r in 0..19 {
                        let host = &hosts[if r < 2 { 0 } else { 2 }];
                        let want = plain_mlp(&row(rows.view(), r), host, activation, weights);
                        for (got, (want, size)) in row(out.view(), r).into_iter().zip(want) {
                            // What stands between the matrices is rounded to the activation type.
                            let rounding = if activations == DType::Bf16 { 1.0 / 128.0 } else { 1e-5 };
                            assert!(
                                (got - want).abs() <= size * rounding + 1e-6,
                                "{} {precision:?} {hidden}x{intermediate} row {r}: {got} for {want}",
                                backend.describe()
                            );
                        }
                    }
                }
            }
        }
    }
}

/// What each row must be, whatever else is in the call: `mlp` of the row alone.
fn alone(
    backend: &CpuBackend,
    rows: View<'_>,
    w: &Mlp,
    activation: Activation,
    out_type: DType,
) -> Vec<Vec<u32>> {
    (0..rows.rows())
        .map(|r| {
            let mut out = memory::tensor(out_type, 1, w.hidden).unwrap();
            experts::mlp(backend, rows.rows_range(r..r + 1), w, activation, out.view_mut()).unwrap();
            bits(out.view(), 0)
        })
        .collect()
}

#[test]
fn a_row_does_not_see_its_neighbours_slots() {
    let mut noise = Noise(4);
    let (hidden, intermediate, rows) = (71, 99, 40);
    for Precision { weights, activations, .. } in Precision::ALL {
        let x = noise.tensor(rows, hidden, activations);
        let hosts: Vec<_> = (0..3).map(|_| noise.mlp(hidden, intermediate, true, weights)).collect();
        for backend in backends() {
            let pack = |i: usize| Some(experts::pack_mlp(&backend, &hosts[i], weights).unwrap());
            let [a, b, c] = [0, 1, 2].map(|i| pack(i).unwrap());
            let want = [&a, &b, &c].map(|w| alone(&backend, x.view(), w, CLAMPED, activations));
            // (order of the experts in the slot table, rows of each slot): empty slots, other orders, other groups.
            let cases: [(&[Option<usize>], &[usize]); 5] = [
                (&[Some(0), Some(1), Some(2)], &[1, 17, 22]),
                (&[Some(2), Some(0), Some(1)], &[30, 3, 7]),
                (&[None, Some(1), None, Some(1), Some(0)], &[0, 14, 0, 1, 25]),
                (&[Some(0), Some(1), Some(2)], &[0, 0, 40]),
                (&[Some(0), None], &[40, 0]),
            ];
            for (order, counts) in cases {
                let slots: Vec<_> = order.iter().map(|i| i.and_then(pack)).collect();
                let mut offsets = vec![0];
                counts.iter().for_each(|n| offsets.push(offsets[offsets.len() - 1] + n));
                let mut out = memory::tensor(activations, rows, hidden).unwrap();
                let args =
                    ExpertsArgs { rows: x.view(), offsets: &offsets, slots: &slots, activation: CLAMPED };
                experts::experts(&backend, args, out.view_mut()).unwrap();
                for (slot, expert) in order.iter().enumerate() {
                    let Some(expert) = *expert else { continue };
                    let first = offsets[slot];
                    for (r, want) in want[expert][first..offsets[slot + 1]].iter().enumerate() {
                        assert_eq!(&bits(out.view(), first + r), want, "row {r} of slot {slot}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_shared_expert_and_routed_ones_do_not_see_each_other() {
    let mut noise = Noise(7);
    let (hidden, tokens) = (70, 21);
    let offsets = [0, 5, 5, 42];
    let quantised = Precision::BF16.with_experts(DType::I8);
    for Precision { experts: weights, activations, .. } in Precision::ALL.into_iter().chain([quantised]) {
        let routed_rows = noise.tensor(42, hidden, activations);
        let shared_rows = noise.tensor(tokens, hidden, activations);
        let hosts: Vec<_> = (0..2).map(|_| noise.mlp(hidden, 99, true, DType::F32)).collect();
        let shared_host = noise.mlp(hidden, 131, false, DType::F32);
        for backend in backends() {
            let pack = |host| experts::pack_mlp(&backend, host, weights).unwrap();
            let slots = [Some(pack(&hosts[0])), None, Some(pack(&hosts[1]))];
            let mlp = pack(&shared_host);
            for (rows, tokens) in [(42, tokens), (42, 0), (0, tokens), (0, 0)] {
                let offsets = offsets.map(|offset| offset.min(rows));
                let routed = || ExpertsArgs {
                    rows: routed_rows.view().rows_range(0..rows),
                    offsets: &offsets,
                    slots: &slots,
                    activation: CLAMPED,
                };
                let shared = SharedArgs {
                    rows: shared_rows.view().rows_range(0..tokens),
                    mlp: &mlp,
                    activation: Activation::SiluMul,
                };
                let outputs = || {
                    let out = memory::tensor(activations, rows, hidden).unwrap();
                    (out, memory::tensor(DType::F32, tokens, hidden).unwrap())
                };
                let (mut want, mut shared_want) = outputs();
                experts::experts(&backend, routed(), want.view_mut()).unwrap();
                experts::mlp(&backend, shared.rows, &mlp, shared.activation, shared_want.view_mut()).unwrap();
                let (mut got, mut shared_got) = outputs();
                let (out, shared_out) = (got.view_mut(), shared_got.view_mut());
                experts::experts_and_shared(&backend, (routed(), out), (shared, shared_out)).unwrap();
                for (rows, got, want) in [(rows, &got, &want), (tokens, &shared_got, &shared_want)] {
                    for r in 0..rows {
                        assert_eq!(bits(got.view(), r), bits(want.view(), r), "{weights:?} row {r}");
                    }
                }
            }
        }
    }
}

#[test]
fn no_rows_is_no_work() {
    let backend = CpuBackend::detect(2).unwrap();
    let x = memory::tensor(DType::Bf16, 0, 8).unwrap();
    let mut out = memory::tensor(DType::F32, 0, 8).unwrap();
    let args = ExpertsArgs {
        rows: x.view(),
        offsets: &[0, 0, 0],
        slots: &[None, None],
        activation: Activation::SiluMul,
    };
    experts::experts(&backend, args, out.view_mut()).unwrap();
    let host = Noise(5).matrix(8, 8, DType::Bf16);
    let packed = gemm::pack_matrix(&backend, &host, DType::Bf16).unwrap();
    gemm::linear(&backend, x.view(), &packed, None, out.view_mut()).unwrap();
}

#[test]
#[should_panic(expected = "slot 1 is empty and has rows")]
fn rows_for_an_empty_slot_are_a_bug() {
    let backend = CpuBackend::detect(1).unwrap();
    let slots = [
        Some(experts::pack_mlp(&backend, &Noise(6).mlp(4, 4, false, DType::F32), DType::F32).unwrap()),
        None,
    ];
    let x = memory::tensor(DType::F32, 2, 4).unwrap();
    let mut out = memory::tensor(DType::F32, 2, 4).unwrap();
    let args =
        ExpertsArgs { rows: x.view(), offsets: &[0, 1, 2], slots: &slots, activation: Activation::SiluMul };
    let _ = experts::experts(&backend, args, out.view_mut());
}
