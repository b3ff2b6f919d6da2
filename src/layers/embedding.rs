//! Both ends of the residual stream: the embedding table and the head.

use crate::backend::{Backend, Tensor, View, ViewMut};
use crate::error::Result;
use crate::layers::linear::Linear;

/// Token embeddings, whole on every rank.
pub struct Embedding {
    /// `[vocab, hidden]`
    pub table: Tensor,
    /// Rows are multiplied by this.
    pub scale: f32,
}

impl Embedding {
    /// Writes the embedding of each token into `out` (f32).
    pub fn forward(&self, backend: &dyn Backend, tokens: &[u32], out: ViewMut<'_>) -> Result<()> {
        backend.embed(self.table.view(), tokens, self.scale, out)
    }
}

/// The head: hidden states to logits. Whole on every rank, so that a row's owner computes its logits alone.
pub struct Head {
    /// `[vocab, hidden]`
    pub linear: Linear,
    /// Logits are multiplied by this.
    pub scale: f32,
}

impl Head {
    /// Writes f32 logits of each normed row.
    pub fn forward(&self, backend: &dyn Backend, x: View<'_>, mut logits: ViewMut<'_>) -> Result<()> {
        self.linear.forward(backend, x, logits.reborrow())?;
        if self.scale != 1.0 {
            backend.scale(self.scale, logits)?;
        }
        Ok(())
    }
}
