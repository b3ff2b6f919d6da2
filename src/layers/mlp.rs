//! A gated MLP that every token visits: the dense layers (tensor-parallel over the intermediate width) and the
//! shared expert (whole on every rank, on owned rows).

use crate::backend::{Backend, Mlp, View, ViewMut};
use crate::error::Result;
use crate::spec::Activation;

/// `down(act(gate x, up x))`.
pub struct GatedMlp {
    /// This rank's slice of the intermediate width.
    pub weights: Mlp,
    /// What happens between the matrices.
    pub activation: Activation,
}

impl GatedMlp {
    /// Applies the MLP to every row of `x`.
    pub fn forward(&self, backend: &dyn Backend, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
        backend.mlp(x, &self.weights, self.activation, out)
    }
}
