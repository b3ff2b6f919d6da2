//! The token router of one layer: logits in f32 whatever the activation type, then the choice.

use crate::backend::{Backend, DType, Tensor, View, ViewMut};
use crate::error::Result;
use crate::layers::RowBuffer;
use crate::layers::linear::Linear;
use crate::spec;

/// Weights of one layer's router.
pub struct Router {
    /// `[experts, hidden]` in f32: a rounded logit could change the choice.
    pub linear: Linear,
    /// `[1, experts]` f32, joins the scores for the choice only.
    pub choice_bias: Option<Tensor>,
    /// How experts are chosen.
    pub spec: spec::Router,
}

/// Choices of the rows of one step, on the device and on the host.
pub struct Routed {
    logits: RowBuffer,
    ids: RowBuffer,
    weights: RowBuffer,
    top_k: usize,
    host_ids: Vec<i32>,
}

impl Routed {
    /// Buffers for `rows` rows.
    pub fn new(backend: &dyn Backend, rows: usize, experts: usize, top_k: usize) -> Result<Self> {
        Ok(Routed {
            logits: RowBuffer::new(backend, DType::F32, rows, experts)?,
            ids: RowBuffer::new(backend, DType::I32, rows, top_k)?,
            weights: RowBuffer::new(backend, DType::F32, rows, top_k)?,
            top_k,
            host_ids: Vec::with_capacity(rows * top_k),
        })
    }

    /// Expert ids `[rows * top_k]`, best first in each row.
    pub fn ids(&self) -> &[i32] {
        &self.host_ids
    }

    /// Factors of the expert outputs, `[rows, top_k]` f32.
    pub fn weights(&self) -> View<'_> {
        self.weights.head(self.host_ids.len() / self.top_k)
    }
}

impl Router {
    /// Chooses experts for every row of `x` (f32, normed).
    pub fn forward(&self, backend: &dyn Backend, x: View<'_>, routed: &mut Routed) -> Result<()> {
        let rows = x.rows();
        routed.host_ids.clear();
        routed.host_ids.resize(rows * routed.top_k, 0);
        if rows == 0 {
            return Ok(());
        }
        self.linear.forward(backend, x, routed.logits.head_mut(rows))?;
        let ids: ViewMut<'_> = routed.ids.head_mut(rows);
        backend.route(
            routed.logits.head(rows),
            self.choice_bias.as_ref().map(Tensor::view),
            &self.spec,
            ids,
            routed.weights.head_mut(rows),
        )?;
        backend.download(routed.ids.head(rows), bytemuck::cast_slice_mut(&mut routed.host_ids))
    }
}
