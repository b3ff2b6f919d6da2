//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): every rank caches the whole latent and computes its
//! share of the heads.

use crate::backend::{Backend, DType, KvCache, MlaArgs, MlaWeights, RopeArgs, View, ViewMut};
use crate::error::Result;
use crate::layers::attention::AttentionStep;
use crate::layers::linear::Linear;
use crate::layers::norm::Norm;
use crate::layers::{Rank, RowBuffer};

/// Weights and shapes of one layer.
pub struct MlaAttention {
    /// First projection of all heads' inputs: the query (or its low-rank form), the latent and the rotary key, one
    /// below the other.
    pub down: Linear,
    /// Low-rank queries: norm, and this rank's heads. `None` when `down` makes this rank's queries directly.
    pub q_up: Option<(Norm, Linear)>,
    /// Norm of the latent.
    pub latent_norm: Norm,
    /// `kv_b_proj` of this rank's heads.
    pub kv_b: MlaWeights,
    /// Output projection: this rank's inputs, all outputs.
    pub out: Linear,
    /// Shapes.
    pub shape: MlaShape,
    /// Scores are multiplied by this.
    pub scale: f32,
    /// Pairing of rotating dimensions.
    pub rope_interleaved: bool,
}

/// Widths of one rank's share of a layer.
#[derive(Debug, Clone, Copy)]
pub struct MlaShape {
    /// Heads on this rank.
    pub heads: usize,
    /// Rank of the query down-projection, if any.
    pub q_lora: Option<usize>,
    /// Width of the latent.
    pub latent: usize,
    /// Width of a key head without rotary.
    pub nope_dim: usize,
    /// Width of the rotary part.
    pub rope_dim: usize,
    /// Width of a value head.
    pub v_dim: usize,
}

impl MlaShape {
    /// Columns of this rank's queries.
    pub fn q_width(&self) -> usize {
        self.heads * (self.nope_dim + self.rope_dim)
    }

    /// Outputs of the first projection that belong to the query.
    pub fn q_down(&self) -> usize {
        self.q_lora.unwrap_or(self.q_width())
    }
}

/// Intermediate rows.
pub struct MlaScratch {
    down: RowBuffer,
    q_normed: RowBuffer,
    q: RowBuffer,
    attended: RowBuffer,
}

impl MlaScratch {
    /// Buffers for up to `rows` rows.
    pub fn new(backend: &dyn Backend, dtype: DType, rows: usize, shape: MlaShape) -> Result<Self> {
        let down = shape.q_down() + shape.latent + shape.rope_dim;
        Ok(MlaScratch {
            down: RowBuffer::new(backend, DType::F32, rows, down)?,
            q_normed: RowBuffer::operand(backend, dtype, rows, shape.q_down())?,
            q: RowBuffer::new(backend, DType::F32, rows, shape.q_width())?,
            attended: RowBuffer::operand(backend, dtype, rows, shape.heads * shape.v_dim)?,
        })
    }
}

impl MlaAttention {
    /// See [`crate::layers::attention::Attention::forward`].
    pub fn forward(
        &self,
        rank: &mut Rank,
        step: AttentionStep<'_>,
        x: View<'_>,
        cache: &mut KvCache,
        scratch: &mut MlaScratch,
        out: ViewMut<'_>,
    ) -> Result<()> {
        let backend = rank.backend.as_ref();
        let rows = x.rows();
        let q_down = self.shape.q_down();
        let latent_end = q_down + self.shape.latent;
        let rope_end = latent_end + self.shape.rope_dim;

        let mut down = scratch.down.head_mut(rows);
        self.down.forward(backend, x, down.reborrow())?;
        self.latent_norm.forward_inplace(backend, down.reborrow().cols_range(q_down..latent_end))?;
        backend.rope(down.reborrow().cols_range(latent_end..rope_end), self.rope(&step, 1, 0))?;

        let mut q = scratch.q.head_mut(rows);
        match &self.q_up {
            Some((norm, up)) => {
                norm.forward(backend, down.as_view().cols_range(0..q_down), scratch.q_normed.head_mut(rows))?;
                up.forward(backend, scratch.q_normed.head(rows), q.reborrow())?;
            }
            None => backend.copy_rows(down.as_view().cols_range(0..q_down), q.reborrow())?,
        }
        backend.rope(q.reborrow(), self.rope(&step, self.shape.heads, self.shape.nope_dim))?;

        let down = down.as_view();
        let (key, latent) = (down.cols_range(latent_end..rope_end), down.cols_range(q_down..latent_end));
        backend.kv_write(key, latent, step.batch, cache)?;
        backend.attention_mla(
            MlaArgs { q: q.as_view(), cache, weights: &self.kv_b, batch: step.batch, scale: self.scale },
            scratch.attended.head_mut(rows),
        )?;
        self.out.forward(backend, scratch.attended.head(rows), out)
    }

    /// Rotation of `heads` heads whose rotating part starts at `offset`.
    fn rope<'a>(&self, step: &AttentionStep<'a>, heads: usize, offset: usize) -> RopeArgs<'a> {
        RopeArgs {
            table: step.rope.view(),
            rows: step.rope_rows,
            heads,
            head_stride: offset + self.shape.rope_dim,
            offset,
            dim: self.shape.rope_dim,
            interleaved: self.rope_interleaved,
        }
    }
}
