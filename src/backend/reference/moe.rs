//! Experts and the combination of their outputs.

use super::dense::{linear, sigmoid};
use super::host::{Host, rounded};
use crate::backend::{CombineArgs, Mlp, View};
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

/// See [`crate::backend::Backend::mlp`]. Parts: gate, up, down, then their biases where there are any.
pub(super) fn mlp(x: View<'_>, w: &Mlp, activation: Activation) -> Host {
    let part = |i: usize| w.parts.get(i).map(|t| Host::read(t.view()));
    let matrix = |i: usize| part(i).expect("an MLP has three matrices");
    let x_host = Host::read(x);
    let gate = linear(&x_host, &matrix(0), part(3).as_ref());
    let up = linear(&x_host, &matrix(1), part(4).as_ref());
    let product = gate.map(|i, d, gate| rounded(activate(gate, up.row(i)[d], activation), x.dtype()));
    linear(&product, &matrix(2), part(5).as_ref())
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
