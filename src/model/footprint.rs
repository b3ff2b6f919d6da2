//! What one rank will hold, computed before anything is read: the counterpart of [`super::load`], allocation by
//! allocation.

use crate::backend::{Backend, DType, KvShape, MOST_CHOICES, Precision};
use crate::layers::rope::RopeTable;
use crate::model::load::{Sizes, kv_shape};
use crate::model::world::Degrees;
use crate::spec::{Attention, FeedForward, ModelSpec, NormKind, QkNorm};
use crate::weights::shard;

/// Bytes of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Footprint {
    /// Weights, the rotary table included.
    pub weights: u64,
    /// The part of the weights that expert slots beyond one per expert hold, on the average rank.
    pub redundant: u64,
    /// The part of the weights that staging places hold, where experts may move.
    pub staging: u64,
    /// One rank's share of one expert.
    pub expert: u64,
    /// Activations, logits and buffers. Rows in flight between ranks are counted for balanced load; a rank that
    /// receives more grows its buffers.
    pub working: u64,
    /// One KV block in all layers.
    pub kv_block: u64,
}

/// The rank whose share is computed, and how it will run.
#[derive(Clone, Copy)]
pub struct Share<'a> {
    /// Its device.
    pub backend: &'a dyn Backend,
    /// Division of the world.
    pub degrees: Degrees,
    /// Expert slots per MoE layer.
    pub slots: usize,
    /// Types of weights and activations.
    pub precision: Precision,
    /// `kv_blocks` is not looked at.
    pub sizes: Sizes,
}

impl Footprint {
    /// The largest rank of the world: the first.
    pub fn of(spec: &ModelSpec, share: Share<'_>) -> Footprint {
        let kv = kv_shape(&spec.attention, 0, share.degrees.tensor_parallel);
        let block = share.backend.kv_block_bytes(kv, share.precision.activations, share.sizes.block_size);
        Footprint {
            weights: share.weights(spec) as u64,
            redundant: share.redundant(spec) as u64,
            staging: share.staging(spec) as u64,
            expert: share.slot(spec) as u64,
            working: share.working(spec) as u64,
            kv_block: (block * spec.layers.len()) as u64,
        }
    }
}

impl Share<'_> {
    fn matrix(&self, outputs: usize, inputs: usize) -> usize {
        self.backend.matrix_bytes(outputs, inputs, self.precision.weights)
    }

    fn weights(&self, spec: &ModelSpec) -> usize {
        let hidden = spec.hidden_size;
        let norms = hidden * 4 * if spec.norm.kind == NormKind::Layer { 2 } else { 1 };
        let ends = spec.vocab_size * hidden * self.precision.weights.bytes()
            + self.matrix(spec.vocab_size, hidden)
            + if spec.lm_head_bias { spec.vocab_size * 4 } else { 0 };
        let layers: usize = spec
            .layers
            .iter()
            .map(|layer| 2 * norms + self.attention(spec) + self.feed_forward(spec, layer.ffn))
            .sum();
        ends + norms + layers + self.staging(spec) + RopeTable::bytes(&spec.rope, self.sizes.max_model_len)
    }

    fn redundant(&self, spec: &ModelSpec) -> usize {
        let ranks = self.degrees.expert_parallel();
        let extra = (self.slots * ranks).saturating_sub(spec.moe.experts);
        spec.moe_layers().len() * extra * self.slot(spec) / ranks
    }

    fn staging(&self, spec: &ModelSpec) -> usize {
        self.sizes.staging_slots * self.slot(spec)
    }

    /// One expert slot: a rank's share of one expert.
    fn slot(&self, spec: &ModelSpec) -> usize {
        let slice = shard::even(spec.moe.intermediate, 0, self.degrees.expert_tp).len();
        self.backend.mlp_bytes(spec.hidden_size, slice, spec.moe.expert_bias, self.precision.experts)
    }

    fn attention(&self, spec: &ModelSpec) -> usize {
        let tp = self.degrees.tensor_parallel;
        let hidden = spec.hidden_size;
        match spec.attention {
            Attention::Gqa { heads, kv_heads, head_dim, qk_norm, .. } => {
                let q = shard::query_heads(heads, 0, tp).len() * head_dim;
                let kv = shard::kv_heads(kv_heads, 0, tp).len() * head_dim;
                let norms = if qk_norm == QkNorm::Off { 0 } else { 4 * (q + kv) };
                let biases = 4 * (q + 2 * kv + hidden + heads);
                self.matrix(q + 2 * kv, hidden) + self.matrix(hidden, q) + norms + biases
            }
            Attention::Mla { heads, q_lora_rank, kv_lora_rank, nope_dim, rope_dim, v_dim, .. } => {
                let own = shard::query_heads(heads, 0, tp).len();
                let queries = own * (nope_dim + rope_dim);
                let down = q_lora_rank.unwrap_or(queries) + kv_lora_rank + rope_dim;
                let up = q_lora_rank.map_or(0, |rank| self.matrix(queries, rank) + 4 * rank);
                let kv_b = self.backend.mla_bytes(own, nope_dim, v_dim, kv_lora_rank, self.precision.weights);
                self.matrix(down, hidden) + up + kv_b + self.matrix(hidden, own * v_dim) + 4 * kv_lora_rank
            }
        }
    }

    fn feed_forward(&self, spec: &ModelSpec, ffn: FeedForward) -> usize {
        let hidden = spec.hidden_size;
        let mlp = |width, dtype| self.backend.mlp_bytes(hidden, width, false, dtype);
        let Precision { weights, experts, .. } = self.precision;
        match ffn {
            FeedForward::Dense { intermediate } => {
                mlp(shard::even(intermediate, 0, self.degrees.tensor_parallel).len(), weights)
            }
            FeedForward::Moe => {
                let moe = &spec.moe;
                let shared = moe.shared.map_or(0, |s| mlp(s.intermediate, experts) + 4 * hidden);
                // The router computes in f32.
                let router = self.backend.matrix_bytes(moe.experts, hidden, DType::F32) + 8 * moe.experts;
                self.slots * self.slot(spec) + shared + router
            }
        }
    }

    fn working(&self, spec: &ModelSpec) -> usize {
        let tp = self.degrees.tensor_parallel;
        let (rows, hidden, wire) =
            (self.sizes.max_rows, spec.hidden_size, self.precision.activations.bytes());
        let owned = rows.div_ceil(tp);
        // residual, normed, output, shared expert in f32; rounded rows; gathered rows and partial sums of the group
        let stream = owned * hidden * (4 * 4 + wire) + rows * hidden * (wire + 4);
        // sent, arrived, grouped, computed, returned; logits of the router; ids and weights of every layer
        let moe = &spec.moe;
        let choices = spec.moe_layers().len() * moe.top_k * 8;
        // Devices that work out their parts of a world by themselves have room for all it may choose in a step.
        let padded = self.degrees.world() > 1 && self.backend.world_plan().is_some();
        let travelling = (owned * moe.top_k).max(if padded { MOST_CHOICES } else { 0 });
        let routed = travelling * 5 * hidden * wire + owned * (4 * moe.experts + choices);
        // What a backend keeps inside: routed rows in the form its kernels want, and between an expert's two matrices.
        let slice = shard::even(moe.intermediate, 0, self.degrees.expert_tp).len();
        let inside = travelling * (hidden + slice) * 4;
        let logits = self.sizes.max_logit_rows * (spec.vocab_size + hidden) * 4;
        stream + routed + inside + logits + rows * self.attention_row(spec)
    }

    /// Working bytes of attention per row.
    fn attention_row(&self, spec: &ModelSpec) -> usize {
        let tp = self.degrees.tensor_parallel;
        let wire = self.precision.activations.bytes();
        match spec.attention {
            Attention::Gqa { heads, .. } => {
                let KvShape::Gqa { kv_heads, head_dim } = kv_shape(&spec.attention, 0, tp) else {
                    unreachable!("a GQA model has a GQA cache")
                };
                let own = shard::query_heads(heads, 0, tp).len();
                (own + 2 * kv_heads) * head_dim * 4 + own * head_dim * wire + 4
            }
            Attention::Mla { heads, q_lora_rank, kv_lora_rank, nope_dim, rope_dim, v_dim, .. } => {
                let own = shard::query_heads(heads, 0, tp).len();
                let queries = own * (nope_dim + rope_dim);
                let down = q_lora_rank.unwrap_or(queries);
                (down + kv_lora_rank + rope_dim + queries) * 4 + (down + own * v_dim) * wire
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::reference::ReferenceBackend;
    use crate::model::families;

    #[test]
    fn weights_are_the_parameters_and_little_more() {
        let spec = families::resolve(include_bytes!("../../models/demo-mixtral/config.json")).unwrap().spec;
        let sizes = Sizes {
            max_model_len: 64,
            block_size: 16,
            kv_blocks: 0,
            max_rows: 8,
            max_logit_rows: 4,
            staging_slots: 0,
        };
        let share = Share {
            backend: &ReferenceBackend,
            degrees: Degrees::SOLO,
            slots: spec.moe.experts,
            precision: Precision::F32,
            sizes,
        };
        let whole = Footprint::of(&spec, share);
        let exact = spec.parameters().total() * 4;
        assert!(whole.weights >= exact && whole.weights < exact + exact / 50, "{} vs {exact}", whole.weights);
        // 6 layers, keys and values of 4 heads of 32 numbers, 16 tokens.
        assert_eq!(whole.kv_block, 6 * 2 * 4 * 32 * 16 * 4);

        let half = Degrees { tensor_parallel: 2, ..Degrees::SOLO };
        let part = Footprint::of(&spec, Share { degrees: half, slots: spec.moe.experts / 2, ..share });
        assert!(part.weights < whole.weights && part.weights > whole.weights / 2);
        assert_eq!(part.kv_block, whole.kv_block / 2);
        assert_eq!((whole.redundant, part.redundant), (0, 0));
        let extra = Footprint::of(&spec, Share { slots: spec.moe.experts + 2, ..share });
        assert_eq!(extra.redundant, extra.weights - whole.weights);
        let moving = Footprint::of(&spec, Share { sizes: Sizes { staging_slots: 3, ..sizes }, ..share });
        assert_eq!((whole.staging, moving.staging), (0, 3 * whole.expert));
        assert_eq!(moving.weights, whole.weights + moving.staging);

        let mixed = Footprint::of(&spec, Share { precision: Precision::MIXED, ..share });
        let narrow = Footprint::of(&spec, Share { precision: Precision::BF16, ..share });
        assert_eq!((mixed.weights, mixed.working), (narrow.weights, whole.working));
        assert_eq!((mixed.kv_block, narrow.kv_block), (whole.kv_block, whole.kv_block / 2));
    }
}
