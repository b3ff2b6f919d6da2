//! Experts in 8 bits on every instruction set of this machine against plain loops: bit for bit.

use half::bf16;

use super::product::PanelProduct;
use super::rows::{Quantize, QuantizedRows};
use super::*;
use crate::backend::cpu::memory::{self, RowsMut};
use crate::backend::cpu::simd::{Isa, Portable, sigmoid_alike};
use crate::backend::reference::ReferenceBackend;
use crate::backend::{Backend, ExpertsArgs, HostData, HostMatrix, HostMlpBias};

/// A reproducible stream of numbers in (-1, 1), now and then a large one, as activations have.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let x = (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        if self.0.is_multiple_of(61) { 9.0 * x } else { x }
    }
    fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
    fn matrix(&mut self, n: usize, k: usize, dtype: DType) -> HostMatrix<'static> {
        let data = self.vec(n * k).into_iter().map(|x| x / (k as f32).sqrt());
        let data = match dtype {
            DType::Bf16 => HostData::Bf16(data.map(bf16::from_f32).collect()),
            _ => HostData::F32(data.collect()),
        };
        HostMatrix { n, k, data }
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
    /// Rows of activations, and the same as a tensor.
    fn rows(&mut self, rows: usize, cols: usize, dtype: DType) -> (Vec<Vec<f32>>, Tensor) {
        let values: Vec<_> = (0..rows)
            .map(|_| self.vec(cols).into_iter().map(|x| rounded(x, dtype)).collect::<Vec<_>>())
            .collect();
        let mut tensor = memory::tensor(dtype, rows, cols).unwrap();
        with_float!(dtype, T => {
            let mut to = RowsMut::<T>::new(tensor.view_mut());
            for (r, row) in values.iter().enumerate() {
                to.row_mut(r).iter_mut().zip(row).for_each(|(to, &x)| *to = T::from_f32(x));
            }
        });
        (values, tensor)
    }
}

fn rounded(x: f32, dtype: DType) -> f32 {
    if dtype == DType::Bf16 { bf16::from_f32(x).to_f32() } else { x }
}

fn backends() -> Vec<CpuBackend> {
    let isas = Isa::available().into_iter();
    isas.flat_map(|isa| [1, 3].map(|threads| CpuBackend::new(threads, isa).unwrap())).collect()
}

fn element(m: &HostMatrix<'_>, at: usize) -> f32 {
    match &m.data {
        HostData::F32(data) => data[at],
        HostData::Bf16(data) => data[at].to_f32(),
        HostData::Quantized(_) => unreachable!("integers are made when experts are packed"),
    }
}

fn quantized(row: &[f32]) -> (Vec<i8>, f32) {
    let mut to = vec![0; row.len()];
    let scale = int8::quantize(row, &mut to);
    (to, scale)
}

/// The formula of [`crate::backend::int8`], sums in 64 bits.
fn plain_product(x: &[f32], w: &HostMatrix<'_>, bias: Option<&[f32]>) -> Vec<f32> {
    let (x, x_scale) = quantized(x);
    (0..w.n)
        .map(|j| {
            let column: Vec<_> = (0..w.k).map(|k| element(w, j * w.k + k)).collect();
            let (column, scale) = quantized(&column);
            let sum: i64 = x.iter().zip(&column).map(|(&x, &w)| i64::from(x) * i64::from(w)).sum();
            let y = i32::try_from(sum).unwrap() as f32 * x_scale * scale;
            bias.map_or(y, |bias| y + bias[j])
        })
        .collect()
}

fn plain_mlp(x: &[f32], w: &HostMlp<'_>, activation: Activation, dtype: DType) -> Vec<f32> {
    let bias = w.bias.as_ref();
    let gate = plain_product(x, &w.gate, bias.map(|b| &b.gate[..]));
    let up = plain_product(x, &w.up, bias.map(|b| &b.up[..]));
    let act = |(&gate, &up): (&f32, &f32)| {
        let all = activate::<Portable, true>(Portable, activation, [gate; 8], [up; 8]);
        rounded(all[0], dtype)
    };
    let between: Vec<f32> = gate.iter().zip(&up).map(act).collect();
    plain_product(&between, &w.down, bias.map(|b| &b.down[..]))
}

fn bits(tensor: &Tensor, r: usize) -> Vec<u32> {
    match tensor.dtype() {
        DType::F32 => Rows::<f32>::new(tensor.view()).row(r).iter().map(|x| x.to_bits()).collect(),
        _ => Rows::<bf16>::new(tensor.view()).row(r).iter().map(|x| x.to_bits().into()).collect(),
    }
}

const CLAMPED: Activation = Activation::ClampedSwiglu { limit: 0.7, alpha: 1.702 };

/// Rows of three slots, the middle one empty.
fn check_experts(
    noise: &mut Noise,
    (hidden, intermediate): (usize, usize),
    rows: usize,
    (activation, bias): (Activation, bool),
    (weights, activations): (DType, DType),
) {
    let hosts = [0, 1, 2].map(|_| noise.mlp(hidden, intermediate, bias, weights));
    let (values, x) = noise.rows(rows, hidden, activations);
    let first = rows / 9;
    let want: Vec<_> = values
        .iter()
        .enumerate()
        .map(|(r, x)| plain_mlp(x, &hosts[if r < first { 0 } else { 2 }], activation, activations))
        .collect();
    for backend in backends() {
        let slots: Vec<_> =
            hosts.iter().map(|host| Some(backend.pack_mlp(host, DType::I8).unwrap())).collect();
        let bytes = slots[0].as_ref().unwrap().bytes();
        assert_eq!(bytes, backend.mlp_bytes(hidden, intermediate, bias, DType::I8));
        for out_type in [DType::F32, DType::Bf16] {
            let mut out = memory::tensor(out_type, rows, hidden).unwrap();
            let offsets = [0, first, first, rows];
            let args = ExpertsArgs { rows: x.view(), offsets: &offsets, slots: &slots, activation };
            backend.experts(args, out.view_mut()).unwrap();
            for (r, want) in want.iter().enumerate() {
                let want: Vec<u32> = match out_type {
                    DType::F32 => want.iter().map(|x| x.to_bits()).collect(),
                    _ => want.iter().map(|&x| bf16::from_f32(x).to_bits().into()).collect(),
                };
                let what = format!("{} {hidden}x{intermediate} row {r} of {rows}", backend.describe());
                assert!(bits(&out, r) == want, "{what}, {activations:?} in, {out_type:?} out");
            }
        }
    }
}

#[test]
fn experts_have_the_bits_of_plain_loops_on_every_instruction_set() {
    let mut noise = Noise(11);
    for types in [(DType::F32, DType::F32), (DType::Bf16, DType::Bf16), (DType::Bf16, DType::F32)] {
        for shape in [(1, 1), (33, 47), (64, 49), (50, 131), (530, 30)] {
            check_experts(&mut noise, shape, 19, (Activation::SiluMul, false), types);
            check_experts(&mut noise, shape, 19, (CLAMPED, true), types);
        }
    }
    check_experts(&mut noise, (40, 60), 270, (Activation::SiluMul, false), (DType::Bf16, DType::Bf16));
}

#[test]
fn the_reference_computes_the_same_but_for_the_rounding_of_an_exponential() {
    let mut noise = Noise(12);
    let backend = CpuBackend::detect(2).unwrap();
    for activations in [DType::F32, DType::Bf16] {
        let host = noise.mlp(96, 130, true, DType::Bf16);
        let (_, x) = noise.rows(21, 96, activations);
        let [got, want] = [&backend as &dyn Backend, &ReferenceBackend].map(|backend| {
            let w = backend.pack_mlp(&host, DType::I8).unwrap();
            assert!(w.bytes() < backend.pack_mlp(&host, DType::Bf16).unwrap().bytes());
            let mut out = memory::tensor(DType::F32, 21, 96).unwrap();
            backend.mlp(x.view(), &w, Activation::SiluMul, out.view_mut()).unwrap();
            out
        });
        for r in 0..21 {
            let [got, want] = [&got, &want].map(|out| Rows::<f32>::new(out.view()).row(r));
            let greatest = want.iter().fold(0.0f32, |greatest, x| greatest.max(x.abs()));
            for (got, want) in got.iter().zip(want) {
                // Now and then a number between the matrices falls on the other side of a border.
                assert!((got - want).abs() <= 0.01 * greatest, "{got} for {want}, greatest {greatest}");
            }
        }
    }
}

#[test]
fn the_reference_counts_its_bytes() {
    let host = Noise(13).mlp(20, 30, true, DType::F32);
    let mlp = ReferenceBackend.pack_mlp(&host, DType::I8).unwrap();
    assert_eq!(mlp.bytes(), ReferenceBackend.mlp_bytes(20, 30, true, DType::I8));
}

#[test]
fn rows_are_quantised_alike_by_vectors_and_plain_loops() {
    let mut noise = Noise(14);
    let backends = backends();
    let mut rows: Vec<Vec<f32>> = (0..40).map(|n| noise.vec(n)).collect();
    rows.extend([vec![1e-38; 20], vec![0.0; 9], vec![f32::MAX, -f32::MAX], vec![0.5, 254.0, -1.0, 3.0]]);
    for row in &rows {
        let (want, want_scale) = quantized(row);
        for backend in &backends {
            let mut to = vec![99i8; 64];
            let (scale, sum) = backend.dispatch(Quantize { from: row, to: &mut to });
            assert_eq!((&to[..row.len()], scale.to_bits()), (&want[..], want_scale.to_bits()), "{row:?}");
            assert_eq!(sum, want.iter().map(|&q| i32::from(q)).sum::<i32>());
            assert!(
                to[row.len()..row.len().next_multiple_of(4)].iter().all(|&q| q == 0),
                "padding of {row:?}"
            );
        }
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in 0..19 {
            let mut row = noise.vec(19);
            row[at] = bad;
            for backend in &backends {
                let (scale, _) = backend.dispatch(Quantize { from: &row, to: &mut [0; 64] });
                assert!(scale.is_nan(), "{bad} at {at}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_reaches_the_output() {
    let mut noise = Noise(15);
    let host = noise.mlp(70, 50, false, DType::F32);
    for backend in backends() {
        let w = backend.pack_mlp(&host, DType::I8).unwrap();
        let (_, mut x) = noise.rows(2, 70, DType::F32);
        RowsMut::<f32>::new(x.view_mut()).row_mut(1)[69] = f32::INFINITY;
        let mut out = memory::tensor(DType::F32, 2, 70).unwrap();
        backend.mlp(x.view(), &w, Activation::SiluMul, out.view_mut()).unwrap();
        let out = Rows::<f32>::new(out.view());
        assert!(out.row(0).iter().all(|x| x.is_finite()) && out.row(1).iter().all(|x| x.is_nan()));
    }
}

#[test]
fn the_greatest_sums_are_exact() {
    let k = int8::MAX_INPUTS;
    for sign in [1, -1] {
        let host = HostMatrix { n: 1, k, data: HostData::F32(vec![sign as f32; k]) };
        for isa in Isa::available() {
            let backend = CpuBackend::new(1, isa).unwrap();
            let (packed, scales) = pack::pack(&backend, &[&host]).unwrap();
            assert_eq!(vector(&scales)[0], 1.0 / 127.0);
            let mut buffer = vec![0; QuantizedRows::bytes(1, k) / 4];
            let x = QuantizedRows::new(&mut buffer, 1, k);
            let mut sums = vec![0; PANEL];
            // SAFETY: the buffer outlives its use, and the row is as wide as the panel is deep.
            unsafe {
                x.fill(&backend, |_| &*vec![1.0f32; k].leak());
                let panel = Panels::new(&packed, 1, 1, k).get(0, 0);
                backend.dispatch(PanelProduct::new(x, 0..1, panel, &mut sums));
            }
            assert_eq!(sums[0], sign * i32::try_from(k * 127 * 127).unwrap(), "{}", isa.name());
            assert!(sums[1..].iter().all(|&sum| sum == 0));
        }
    }
}

#[test]
fn the_sigmoid_of_all_instruction_sets_is_one() {
    struct Sigmoid<'a>(&'a mut [f32]);
    impl Kernel for Sigmoid<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for part in self.0.chunks_exact_mut(S::LANES) {
                // SAFETY: the chunk is a whole vector.
                unsafe { simd.store(part.as_mut_ptr(), sigmoid_alike(simd, simd.load(part.as_ptr()))) };
            }
        }
    }
    let mut noise = Noise(16);
    let mut values: Vec<f32> = (0..4096).map(|i| noise.next() * (i % 130) as f32).collect();
    values[..6].copy_from_slice(&[0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 1e-40, -88.9]);
    let all: Vec<Vec<u32>> = Isa::available()
        .into_iter()
        .map(|isa| {
            let mut values = values.clone();
            isa.dispatch(Sigmoid(&mut values));
            values.iter().map(|x| x.to_bits()).collect()
        })
        .collect();
    assert!(all.iter().all(|bits| bits == &all[0]));
}
