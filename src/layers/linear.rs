//! A linear layer. Column-parallel (each rank holds some outputs) or row-parallel (each rank holds some inputs and
//! returns partial sums) is a matter of which slice was loaded.

use crate::backend::{Backend, Matrix, Tensor, View, ViewMut};
use crate::error::Result;

/// `y = W x (+ b)`.
pub struct Linear {
    /// `[outputs, inputs]` in the backend's layout.
    pub weight: Matrix,
    /// `[1, outputs]` f32. A row-parallel layer has it on the group's first rank only, so that the sum holds it once.
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Outputs on this rank.
    pub fn outputs(&self) -> usize {
        self.weight.n
    }

    /// Applies the layer to every row of `x`.
    pub fn forward(&self, backend: &dyn Backend, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
        backend.linear(x, &self.weight, self.bias.as_ref().map(Tensor::view), out)
    }
}
