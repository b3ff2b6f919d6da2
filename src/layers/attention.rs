//! What the two kinds of attention have in common: the front the transformer calls.

use crate::backend::{AttentionBatch, KvCache, View, ViewMut};
use crate::error::Result;
use crate::layers::Rank;
use crate::layers::attention_gqa::{GqaAttention, GqaScratch};
use crate::layers::attention_mla::{MlaAttention, MlaScratch};
use crate::layers::rope::RopeTable;

/// Attention of one layer with this rank's share of the heads.
pub enum Attention {
    /// Grouped-query attention.
    Gqa(GqaAttention),
    /// Multi-head latent attention.
    Mla(MlaAttention),
}

/// Intermediate rows, shared by all layers.
pub enum AttentionScratch {
    /// For [`Attention::Gqa`].
    Gqa(GqaScratch),
    /// For [`Attention::Mla`].
    Mla(MlaScratch),
}

/// The rows of a step and where they stand.
#[derive(Clone, Copy)]
pub struct AttentionStep<'a> {
    /// Sequences and blocks.
    pub batch: AttentionBatch<'a>,
    /// Rotary angles.
    pub rope: &'a RopeTable,
    /// Row of the rotary table for each batch row.
    pub rope_rows: &'a [u32],
}

impl Attention {
    /// Writes the rows' keys and values into `cache` and this rank's partial sums of the layer's output into `out` (f32).
    ///
    /// # Panics
    /// When `scratch` is of the other kind.
    pub fn forward(
        &self,
        rank: &mut Rank,
        step: AttentionStep<'_>,
        x: View<'_>,
        cache: &mut KvCache,
        scratch: &mut AttentionScratch,
        out: ViewMut<'_>,
    ) -> Result<()> {
        match (self, scratch) {
            (Attention::Gqa(layer), AttentionScratch::Gqa(scratch)) => {
                layer.forward(rank, step, x, cache, scratch, out)
            }
            (Attention::Mla(layer), AttentionScratch::Mla(scratch)) => {
                layer.forward(rank, step, x, cache, scratch, out)
            }
            _ => panic!("attention scratch of another kind"),
        }
    }
}
