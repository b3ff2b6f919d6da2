//! Experts and the combination of their outputs.

use super::dense::{linear, sigmoid};
use super::host::{Host, read_ints, rounded};
use super::quantized;
use crate::backend::{CombineArgs, DType, Mlp, View, int8};
use crate::spec::Activation;

/// What happens between the two matrices; see [`Activation`].
fn activate(gate: f32, up: f32, activation: Activation) -> f32 {
    match activation {
        Activation::SiluMul => gate * sigmoid(gate) * up,
        Activation::ClampedSwiglu { limit, alpha } => {
            let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
            gate * sigmoid(alpha * gate) * (up + 1.0)
        }
    }
}

/// See [`crate::backend::Backend::mlp`]. Parts: gate, up, down, then their scales where they are quantised, then their biases where
/// there are any.
pub(super) fn mlp(x: View<'_>, w: &Mlp, activation: Activation) -> Host {
    let x_host = Host::read(x);
    let gate = product(&x_host, w, 0);
    let up = product(&x_host, w, 1);
    let between = gate.map(|i, d, gate| rounded(activate(gate, up.row(i)[d], activation), x.dtype()));
    product(&between, w, 2)
}

/// `x` times one of the matrices.
fn product(x: &Host, w: &Mlp, matrix: usize) -> Host {
    let part = |i: usize| w.parts.get(i).map(|t| Host::read(t.view()));
    let weights = &w.parts[matrix];
    match weights.dtype() {
        DType::I8 => {}
        DType::F8 | DType::I4x2 => {
            let weights = quantized::read(weights, &w.parts[3 + matrix], x.cols);
            return linear(x, &weights, part(6 + matrix).as_ref());
        }
        _ => return linear(x, &Host::read(weights.view()), part(3 + matrix).as_ref()),
    }
    let scales = part(3 + matrix).expect("integers have scales");
    let bias = part(6 + matrix);
    let weights = read_ints::<i8>(weights.view());
    let (rows, row_scales) = quantized(x);
    Host::new(x.rows, scales.cols).map(|i, j, _| {
        let row = &rows[i * x.cols..][..x.cols];
        let column = &weights[j * x.cols..][..x.cols];
        let sum: i32 = row.iter().zip(column).map(|(&x, &w)| i32::from(x) * i32::from(w)).sum();
        sum as f32 * row_scales[i] * scales.data[j] + bias.as_ref().map_or(0.0, |bias| bias.data[j])
    })
}

/// Rows in 8 bits, and their scales.
pub(super) fn quantized(x: &Host) -> (Vec<i8>, Vec<f32>) {
    let mut values = vec![0; x.data.len()];
    let scale = |i: usize| int8::quantize(x.row(i), &mut values[i * x.cols..][..x.cols]);
    let scales = (0..x.rows).map(scale).collect();
    (values, scales)
}

/// See [`crate::backend::Backend::combine`].
pub(super) fn combine(args: &CombineArgs<'_>) -> Host {
    let rows = Host::read(args.rows);
    let weights = Host::read(args.weights);
    let (tokens, top_k) = (weights.rows, weights.cols);
    Host::new(tokens, rows.cols).map(|t, d, _| {
        let mut sum = 0.0;
        for j in 0..top_k {
            let parts = &args.index[(t * top_k + j) * args.parts..][..args.parts];
            let output: f32 = parts.iter().map(|&row| rows.row(row as usize)[d]).sum();
            sum += weights.row(t)[j] * output;
        }
        sum
    })
}
