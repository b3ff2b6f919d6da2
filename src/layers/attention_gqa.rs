//! Grouped-query attention over a paged cache, with this rank's share of the heads.

use crate::backend::{Backend, DType, GqaArgs, KvCache, RopeArgs, Tensor, View, ViewMut};
use crate::error::Result;
use crate::layers::attention::AttentionStep;
use crate::layers::linear::Linear;
use crate::layers::norm::Norm;
use crate::layers::{Rank, RowBuffer};

/// Weights and shapes of one layer.
pub struct GqaAttention {
    /// Query, key and value projections of this rank's heads, one below the other.
    pub qkv: Linear,
    /// Output projection: this rank's inputs, all outputs.
    pub out: Linear,
    /// Query heads on this rank.
    pub heads: usize,
    /// KV heads on this rank.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Scores are multiplied by this.
    pub scale: f32,
    /// Sliding window.
    pub window: Option<usize>,
    /// `[1, heads]` f32.
    pub sinks: Option<Tensor>,
    /// Norm of queries and keys before rotary.
    pub qk_norm: Option<QkNorm>,
    /// q, k and v are clamped to this magnitude, after the norms.
    pub clip_qkv: Option<f32>,
    /// Leading dimensions of a head that rotate.
    pub rope_dim: usize,
    /// Pairing of rotating dimensions.
    pub rope_interleaved: bool,
}

/// Norms of queries and keys.
pub enum QkNorm {
    /// Over each head by itself.
    PerHead {
        /// Width `head_dim`.
        q: Norm,
        /// Width `head_dim`.
        k: Norm,
    },
    /// Over the projections of all ranks together.
    FullWidth(FullWidthNorm),
}

/// RMS norms whose width is split over the tensor-parallel group.
pub struct FullWidthNorm {
    /// This rank's part of the query weights, `[1, heads * head_dim]`.
    pub q: Tensor,
    /// This rank's part of the key weights, `[1, kv_heads * head_dim]`.
    pub k: Tensor,
    /// Width of all ranks' queries together.
    pub q_width: usize,
    /// Width of all ranks' distinct keys together.
    pub k_width: usize,
    /// This rank is the first that holds its KV heads: replicas must not count twice.
    pub counts_keys: bool,
    /// Added to the mean square.
    pub eps: f32,
}

/// Intermediate rows.
pub struct GqaScratch {
    qkv: RowBuffer,
    attended: RowBuffer,
    /// Sums of squares, for [`QkNorm::FullWidth`].
    squares: RowBuffer,
}

impl GqaScratch {
    /// Buffers for up to `rows` rows of `heads` query and `kv_heads` KV heads.
    pub fn new(
        backend: &dyn Backend,
        dtype: DType,
        rows: usize,
        (heads, kv_heads, head_dim): (usize, usize, usize),
    ) -> Result<Self> {
        Ok(GqaScratch {
            qkv: RowBuffer::new(backend, DType::F32, rows, (heads + 2 * kv_heads) * head_dim)?,
            attended: RowBuffer::operand(backend, dtype, rows, heads * head_dim)?,
            squares: RowBuffer::new(backend, DType::F32, rows, 1)?,
        })
    }
}

impl GqaAttention {
    /// See [`crate::layers::attention::Attention::forward`].
    pub fn forward(
        &self,
        rank: &mut Rank,
        step: AttentionStep<'_>,
        x: View<'_>,
        cache: &mut KvCache,
        scratch: &mut GqaScratch,
        out: ViewMut<'_>,
    ) -> Result<()> {
        let backend = rank.backend.clone();
        let backend = backend.as_ref();
        let rows = x.rows();
        let q_end = self.heads * self.head_dim;
        let k_end = q_end + self.kv_heads * self.head_dim;

        let mut qkv = scratch.qkv.head_mut(rows);
        self.qkv.forward(backend, x, qkv.reborrow())?;
        if let Some(norm) = &self.qk_norm {
            norm.apply(rank, qkv.reborrow(), q_end, k_end, scratch.squares.head_mut(rows))?;
        }
        if let Some(limit) = self.clip_qkv {
            backend.clamp(limit, qkv.reborrow())?;
        }
        // Queries and keys lie side by side, so one call rotates both.
        let rope = RopeArgs {
            table: step.rope.view(),
            rows: step.rope_rows,
            heads: self.heads + self.kv_heads,
            head_stride: self.head_dim,
            offset: 0,
            dim: self.rope_dim,
            interleaved: self.rope_interleaved,
        };
        backend.rope_kv_write(qkv.reborrow(), rope, step.batch, cache)?;
        let qkv = qkv.as_view();
        backend.attention_gqa(
            GqaArgs {
                q: qkv.cols_range(0..q_end),
                cache,
                batch: step.batch,
                heads: self.heads,
                scale: self.scale,
                window: self.window,
                sinks: self.sinks.as_ref().map(Tensor::view),
            },
            scratch.attended.head_mut(rows),
        )?;
        self.out.forward(backend, scratch.attended.head(rows), out)
    }
}

impl QkNorm {
    /// Norms the query columns `0..q_end` and the key columns `q_end..k_end` of `qkv` in place.
    fn apply(
        &self,
        rank: &mut Rank,
        mut qkv: ViewMut<'_>,
        q_end: usize,
        k_end: usize,
        squares: ViewMut<'_>,
    ) -> Result<()> {
        match self {
            QkNorm::PerHead { q, k } => {
                let backend = rank.backend.as_ref();
                q.forward_inplace(backend, qkv.reborrow().cols_range(0..q_end))?;
                k.forward_inplace(backend, qkv.cols_range(q_end..k_end))
            }
            QkNorm::FullWidth(norm) => {
                let FullWidthNorm { q, k, q_width, k_width, counts_keys, eps } = norm;
                let mut squares = squares;
                let queries = qkv.reborrow().cols_range(0..q_end);
                full_width(rank, queries, q.view(), *q_width, true, *eps, squares.reborrow())?;
                let keys = qkv.cols_range(q_end..k_end);
                full_width(rank, keys, k.view(), *k_width, *counts_keys, *eps, squares)
            }
        }
    }
}

/// RMS norm of rows whose columns are spread over the tensor-parallel group.
fn full_width(
    rank: &mut Rank,
    x: ViewMut<'_>,
    weight: View<'_>,
    width: usize,
    counts: bool,
    eps: f32,
    mut squares: ViewMut<'_>,
) -> Result<()> {
    rank.backend.square_sum(x.as_view(), squares.reborrow())?;
    if !counts {
        rank.backend.scale(0.0, squares.reborrow())?;
    }
    let bytes = squares.rows() * squares.cols() * squares.dtype().bytes();
    rank.tp.all_reduce_sum(squares.reborrow())?;
    rank.count_gathering(bytes, bytes * rank.tp.size());
    rank.backend.scale_by_square_sum(squares.as_view(), width, eps, weight, x)
}
