//! Layer norms with their weights.

use crate::backend::{AddNormArgs, Backend, NormArgs, Tensor, View, ViewMut};
use crate::error::Result;
use crate::spec::{self, NormKind};

/// An RMS or mean-and-variance norm over vectors of one width.
pub struct Norm {
    /// Kind and epsilon.
    pub spec: spec::Norm,
    /// `[1, width]` f32.
    pub weight: Tensor,
    /// `[1, width]` f32 for [`NormKind::Layer`].
    pub bias: Option<Tensor>,
}

impl Norm {
    /// An RMS norm.
    pub fn rms(weight: Tensor, eps: f32) -> Self {
        Norm { spec: spec::Norm { kind: NormKind::Rms, eps }, weight, bias: None }
    }

    /// `out = norm(x)`; `x` may hold several vectors side by side in a row.
    pub fn forward(&self, backend: &dyn Backend, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
        backend.norm(x, self.args(), out)
    }

    /// `x = norm(x)`.
    pub fn forward_inplace(&self, backend: &dyn Backend, x: ViewMut<'_>) -> Result<()> {
        backend.norm_inplace(x, self.args())
    }

    /// `x += addend`, then `rounded = norm(x)`, and `exact` where that is wanted.
    pub fn forward_sum(
        &self,
        backend: &dyn Backend,
        x: ViewMut<'_>,
        addend: Option<(View<'_>, f32)>,
        exact: Option<ViewMut<'_>>,
        rounded: ViewMut<'_>,
    ) -> Result<()> {
        backend.add_norm(x, AddNormArgs { addend, norm: self.args(), exact, rounded })
    }

    fn args(&self) -> NormArgs<'_> {
        NormArgs {
            kind: self.spec.kind,
            eps: self.spec.eps,
            weight: self.weight.view(),
            bias: self.bias.as_ref().map(Tensor::view),
            width: self.weight.cols(),
        }
    }
}
