//! What the operations of a [`super::Backend`] take.

use super::{KvCache, MlaWeights, Mlp, View, ViewMut};
use crate::spec::{Activation, NormKind};

/// The rows of one sequence in a batch: a run of consecutive positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeqSpan {
    /// First batch row.
    pub row: u32,
    /// Number of rows; at least 1.
    pub rows: u32,
    /// Position of the first row; everything before it is in the cache already.
    pub position: u32,
    /// Tokens of the prompt: rows at positions below it take MLA's expanded form, the others the absorbed one.
    pub prompt_len: u32,
    /// Where this sequence's blocks start in [`AttentionBatch::block_table`].
    pub first_block: u32,
}

/// Which rows of a batch belong to which sequence, and where their KV lives.
#[derive(Debug, Clone, Copy)]
pub struct AttentionBatch<'a> {
    /// Sequences in row order, covering all rows.
    pub spans: &'a [SeqSpan],
    /// Block numbers: position p of a span is in block `block_table[first_block + p / block_size]`.
    pub block_table: &'a [u32],
}

impl AttentionBatch<'_> {
    /// Rows of all spans.
    pub fn rows(&self) -> usize {
        self.spans.iter().map(|s| s.rows as usize).sum()
    }
}

/// Arguments of [`super::Backend::attention_gqa`].
pub struct GqaArgs<'a> {
    /// Queries `[rows, heads * head_dim]`, rotated.
    pub q: View<'a>,
    /// Keys and values of all positions up to and including this batch's rows.
    pub cache: &'a KvCache,
    /// Rows and blocks.
    pub batch: AttentionBatch<'a>,
    /// Query heads on this rank; a multiple of the cache's KV heads.
    pub heads: usize,
    /// Scores are multiplied by this.
    pub scale: f32,
    /// Attend to the last `window` positions only, the row's own included.
    pub window: Option<usize>,
    /// `[1, heads]` f32: one more logit in each head's softmax, without a value.
    pub sinks: Option<View<'a>>,
}

/// Arguments of [`super::Backend::attention_mla`].
pub struct MlaArgs<'a> {
    /// Queries `[rows, heads * (nope_dim + rope_dim)]`; the rotary part of each head is rotated.
    pub q: View<'a>,
    /// Latents and rotary keys of all positions up to and including this batch's rows.
    pub cache: &'a KvCache,
    /// `kv_b_proj` of this layer.
    pub weights: &'a MlaWeights,
    /// Rows and blocks.
    pub batch: AttentionBatch<'a>,
    /// Scores are multiplied by this.
    pub scale: f32,
}

/// Arguments of [`super::Backend::rope`].
pub struct RopeArgs<'a> {
    /// `[positions, dim]` f32: `dim / 2` cosines, then `dim / 2` sines.
    pub table: View<'a>,
    /// Row of `table` for each row of the data.
    pub rows: &'a [u32],
    /// Heads per row.
    pub heads: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
    /// Where in a head the rotating part starts.
    pub offset: usize,
    /// Width of the rotating part.
    pub dim: usize,
    /// Pairs are (2i, 2i+1) rather than (i, i + dim/2).
    pub interleaved: bool,
}

/// Arguments of [`super::Backend::norm`].
#[derive(Clone, Copy)]
pub struct NormArgs<'a> {
    /// RMS or mean-and-variance.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f32,
    /// `[1, width]` f32.
    pub weight: View<'a>,
    /// `[1, width]` f32, for [`NormKind::Layer`].
    pub bias: Option<View<'a>>,
    /// Columns of `x` that form one vector: `width` divides them, and each group of `width` is normed by itself.
    pub width: usize,
}

/// Arguments of [`super::Backend::add_norm`].
pub struct AddNormArgs<'a> {
    /// Rows that are added first, times a factor.
    pub addend: Option<(View<'a>, f32)>,
    /// The norm.
    pub norm: NormArgs<'a>,
    /// Normed rows in f32, where they are wanted.
    pub exact: Option<ViewMut<'a>>,
    /// The same, rounded to this view's type.
    pub rounded: ViewMut<'a>,
}

/// Grouped rows for [`super::Backend::experts`].
pub struct ExpertsArgs<'a> {
    /// Activations `[rows, hidden]`, sorted by slot.
    pub rows: View<'a>,
    /// Rows `offsets[s]..offsets[s + 1]` belong to slot `s`; `slots.len() + 1` entries.
    pub offsets: &'a [usize],
    /// The slot table; an empty slot has no rows.
    pub slots: &'a [Option<Mlp>],
    /// What happens between the two matrices.
    pub activation: Activation,
}

/// A shared expert beside those of [`ExpertsArgs`]: all rows through one MLP.
pub struct SharedArgs<'a> {
    /// Activations `[rows, hidden]`, of the type of the routed ones.
    pub rows: View<'a>,
    /// The expert, with weights of the type of the others.
    pub mlp: &'a Mlp,
    /// What happens between its matrices.
    pub activation: Activation,
}

/// Arguments of [`super::Backend::combine`].
pub struct CombineArgs<'a> {
    /// Expert outputs `[_, hidden]`, in any order.
    pub rows: View<'a>,
    /// For token `t`, choice `j`, part `x`: which of `rows` holds it; index `(t * top_k + j) * parts + x`.
    pub index: &'a [u32],
    /// `[tokens, top_k]` f32.
    pub weights: View<'a>,
    /// Ranks that each computed a part of an expert's sum (the tensor split inside an expert); 1 without.
    pub parts: usize,
}
