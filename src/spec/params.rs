//! How many numbers a model's weights hold, in all, per token and per rank: arithmetic on a [`ModelSpec`]. Sizes that
//! passed `model/families` cannot overflow 64 bits here, not even as bytes.

use super::{Attention, FeedForward, ModelSpec, NormKind, QkNorm};

/// Numbers in the weights, by kind. Biases belong to what they are added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Parameters {
    /// Token embedding.
    pub embedding: u64,
    /// Output head; 0 where it reads the embedding matrix.
    pub head: u64,
    /// Norms before attention, before the feed-forward half and at the end.
    pub norms: u64,
    /// Attention of all layers, its inner norms and sinks included.
    pub attention: u64,
    /// MLPs of layers without experts.
    pub dense: u64,
    /// Routers, their biases included.
    pub router: u64,
    /// Routed experts.
    pub experts: u64,
    /// Shared experts and their gates.
    pub shared: u64,
}

impl Parameters {
    /// All kinds together.
    pub fn total(&self) -> u64 {
        self.embedding
            + self.head
            + self.norms
            + self.attention
            + self.dense
            + self.router
            + self.experts
            + self.shared
    }
}

/// How a model is divided among ranks, as far as one rank's weights depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Ranks that share attention heads and the width of dense MLPs.
    pub tensor: usize,
    /// Ranks that share the width of one expert.
    pub expert_tensor: usize,
    /// Places for experts on a rank, per MoE layer.
    pub slots: usize,
}

impl ModelSpec {
    /// All parameters of the model.
    pub fn parameters(&self) -> Parameters {
        self.rank_parameters(Split { tensor: 1, expert_tensor: 1, slots: self.moe.experts })
    }

    /// Parameters that one token meets: everything but the experts that were not chosen for it.
    pub fn active_parameters(&self) -> u64 {
        let chosen = Split { tensor: 1, expert_tensor: 1, slots: self.moe.top_k };
        self.rank_parameters(chosen).total()
    }

    /// Parameters on one rank with all slots filled. Embedding, head, norms, routers and shared experts are whole on
    /// every rank, because each rank runs them for the rows it owns; KV heads are replicated where there are fewer
    /// than ranks.
    pub fn rank_parameters(&self, split: Split) -> Parameters {
        let hidden = count(self.hidden_size);
        let layers = count(self.layers.len());
        let moe_layers = count(self.moe_layers().len());
        let vocabulary = count(self.vocab_size) * hidden;
        let dense = |ffn: FeedForward| match ffn {
            FeedForward::Dense { intermediate } => 3 * hidden * part(intermediate, split.tensor),
            FeedForward::Moe => 0,
        };
        let norm_width = match self.norm.kind {
            NormKind::Rms => hidden,
            NormKind::Layer => 2 * hidden,
        };
        let head_bias = if self.lm_head_bias { count(self.vocab_size) } else { 0 };
        Parameters {
            embedding: vocabulary,
            head: if self.tied_embeddings { 0 } else { vocabulary } + head_bias,
            norms: (2 * layers + 1) * norm_width,
            attention: layers * self.attention.parameters(hidden, split.tensor),
            dense: self.layers.iter().map(|layer| dense(layer.ffn)).sum(),
            router: moe_layers * self.router_parameters(),
            experts: moe_layers * count(split.slots) * self.expert_parameters(split.expert_tensor),
            shared: moe_layers * self.shared_parameters(),
        }
    }

    fn router_parameters(&self) -> u64 {
        let biases = u64::from(self.moe.router.logit_bias) + u64::from(self.moe.router.choice_bias);
        count(self.moe.experts) * (count(self.hidden_size) + biases)
    }

    fn expert_parameters(&self, ranks: usize) -> u64 {
        let hidden = count(self.hidden_size);
        let width = part(self.moe.intermediate, ranks);
        let bias = if self.moe.expert_bias { 2 * width + hidden } else { 0 };
        3 * hidden * width + bias
    }

    fn shared_parameters(&self) -> u64 {
        let hidden = count(self.hidden_size);
        let gate = |gated| if gated { hidden } else { 0 };
        self.moe.shared.map_or(0, |s| 3 * hidden * count(s.intermediate) + gate(s.gated))
    }

    /// Numbers that one token keeps in the KV cache of one rank, all layers together.
    pub fn kv_numbers_per_token(&self, tensor_ranks: usize) -> u64 {
        let per_layer = match self.attention {
            Attention::Gqa { kv_heads, head_dim, .. } => 2 * part(kv_heads, tensor_ranks) * count(head_dim),
            Attention::Mla { kv_lora_rank, rope_dim, .. } => count(kv_lora_rank + rope_dim),
        };
        count(self.layers.len()) * per_layer
    }
}

impl Attention {
    /// Parameters of one layer on one of `ranks` ranks.
    fn parameters(&self, hidden: u64, ranks: usize) -> u64 {
        let bias = |has: bool, width: u64| if has { width } else { 0 };
        match *self {
            Attention::Gqa { heads, kv_heads, head_dim, qkv_bias, out_bias, qk_norm, sinks, .. } => {
                let query = part(heads, ranks) * count(head_dim);
                let key = part(kv_heads, ranks) * count(head_dim);
                let norms = match qk_norm {
                    QkNorm::Off => 0,
                    QkNorm::PerHead => 2 * count(head_dim),
                    QkNorm::FullWidth => query + key,
                };
                hidden * (2 * query + 2 * key)
                    + bias(qkv_bias, query + 2 * key)
                    + bias(out_bias, hidden)
                    + norms
                    + bias(sinks, part(heads, ranks))
            }
            Attention::Mla {
                heads,
                q_lora_rank,
                kv_lora_rank,
                nope_dim,
                rope_dim,
                v_dim,
                bias: biased,
                ..
            } => {
                let heads = part(heads, ranks);
                let query = heads * count(nope_dim + rope_dim);
                let latent = count(kv_lora_rank);
                let cached = latent + count(rope_dim);
                let queries = match q_lora_rank.map(count) {
                    None => hidden * query,
                    Some(rank) => rank * (hidden + 1 + query) + bias(biased, rank),
                };
                queries
                    + hidden * cached
                    + bias(biased, cached)
                    + latent
                    + heads * count(nope_dim + v_dim) * latent
                    + hidden * heads * count(v_dim)
                    + bias(biased, hidden)
            }
        }
    }
}

/// A size as a factor of a count.
fn count(size: usize) -> u64 {
    size as u64
}

/// The share of the busiest of `ranks` ranks.
fn part(size: usize, ranks: usize) -> u64 {
    count(size.div_ceil(ranks))
}
