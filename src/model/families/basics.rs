//! What every decoder's config.json says under the same keys, and the parts of a spec that all families build alike.

use super::keys::{Keys, MAX_EXPERTS, MAX_HIDDEN, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH};
use crate::spec::{Attention, FeedForward, Layer, ModelSpec, Moe, Norm, NormKind, Quantization, Rope};

/// Values transformers' configuration class has for keys that are absent.
pub(super) struct Defaults {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// `None`: as many as query heads.
    pub num_key_value_heads: Option<usize>,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub eos_token_id: Option<u32>,
}

/// The same keys as read.
pub(super) struct Basics {
    pub vocab_size: usize,
    pub hidden: usize,
    /// Width of dense layers, and of experts in families without a key of their own for them.
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub max_position: usize,
    pub norm_eps: f32,
    pub tied_embeddings: bool,
    pub eos_token_ids: Vec<u32>,
}

/// What a family adds to [`Basics`] to make a whole spec.
pub(super) struct Parts {
    pub family: &'static str,
    pub attention: Attention,
    pub rope: Rope,
    pub layers: Vec<Layer>,
    pub moe: Moe,
    pub quantization: Option<Quantization>,
}

impl Basics {
    /// Reads the keys all families share and refuses activations other than SiLU.
    pub(super) fn read(keys: &Keys, defaults: &Defaults) -> Self {
        keys.only_text("hidden_act", "silu");
        let heads = keys.size("num_attention_heads", defaults.num_attention_heads, MAX_WIDTH);
        let kv_default = defaults.num_key_value_heads.unwrap_or(heads);
        let kv_heads =
            keys.optional_size("num_key_value_heads", Some(kv_default), MAX_WIDTH).unwrap_or(heads);
        keys.require(
            heads.is_multiple_of(kv_heads),
            "num_key_value_heads",
            format!("a divisor of num_attention_heads {heads}"),
            kv_heads,
        );
        Basics {
            vocab_size: keys.size("vocab_size", defaults.vocab_size, MAX_VOCAB),
            hidden: keys.size("hidden_size", defaults.hidden_size, MAX_HIDDEN),
            intermediate: keys.size("intermediate_size", defaults.intermediate_size, MAX_WIDTH),
            layers: keys.size("num_hidden_layers", defaults.num_hidden_layers, MAX_LAYERS),
            heads,
            kv_heads,
            max_position: keys.size(
                "max_position_embeddings",
                defaults.max_position_embeddings,
                MAX_POSITIONS,
            ),
            norm_eps: keys.positive("rms_norm_eps", defaults.rms_norm_eps) as f32,
            tied_embeddings: keys.flag("tie_word_embeddings", false),
            eos_token_ids: keys.token_ids("eos_token_id", defaults.eos_token_id),
        }
    }

    /// `head_dim`, or the hidden width divided among the heads where it is absent or null.
    pub(super) fn head_dim(&self, keys: &Keys) -> usize {
        let head_dim = keys.optional_size("head_dim", None, MAX_WIDTH).unwrap_or_else(|| {
            keys.require(
                self.hidden.is_multiple_of(self.heads),
                "num_attention_heads",
                format!("a divisor of hidden_size {} (there is no head_dim)", self.hidden),
                self.heads,
            );
            (self.hidden / self.heads).max(1)
        });
        let width = self.heads.saturating_mul(head_dim);
        keys.require(width <= MAX_WIDTH, "head_dim", format!("heads * head_dim <= {MAX_WIDTH}"), width);
        head_dim
    }

    /// `num_experts_per_tok`, which may not exceed the experts.
    pub(super) fn top_k(&self, keys: &Keys, default: usize, experts: usize) -> usize {
        let key = "num_experts_per_tok";
        let top_k = keys.size(key, default, MAX_EXPERTS);
        keys.require(top_k <= experts, key, format!("at most {experts}, the number of experts"), top_k);
        top_k
    }

    /// One layer per index: its window, and experts where `moe` says so.
    pub(super) fn build_layers(
        &self,
        window: impl Fn(usize) -> Option<usize>,
        moe: impl Fn(usize) -> bool,
    ) -> Vec<Layer> {
        let dense = FeedForward::Dense { intermediate: self.intermediate };
        let ffn = |l| if moe(l) { FeedForward::Moe } else { dense };
        (0..self.layers).map(|l| Layer { window: window(l), ffn: ffn(l) }).collect()
    }

    /// A spec with RMS norms, a plain head and no scales; a family overrides what differs.
    pub(super) fn into_spec(self, parts: Parts) -> ModelSpec {
        ModelSpec {
            family: parts.family,
            vocab_size: self.vocab_size,
            hidden_size: self.hidden,
            max_position_embeddings: self.max_position,
            attention: parts.attention,
            rope: parts.rope,
            layers: parts.layers,
            moe: parts.moe,
            norm: Norm { kind: NormKind::Rms, eps: self.norm_eps },
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logits_scale: 1.0,
            tied_embeddings: self.tied_embeddings,
            lm_head_bias: false,
            eos_token_ids: self.eos_token_ids,
            quantization: parts.quantization,
        }
    }
}

/// `layer_types`: which layers slide; `None` where the key is absent.
pub(super) fn sliding_layers(keys: &Keys, layers: usize) -> Option<Vec<bool>> {
    let key = "layer_types";
    let types = keys.texts(key)?;
    keys.require(types.len() == layers, key, format!("{layers} entries, one per layer"), types.len());
    if let Some(other) = types.iter().find(|t| !matches!(**t, "sliding_attention" | "full_attention")) {
        keys.problem(key, "sliding_attention or full_attention", *other);
    }
    let mut sliding: Vec<bool> = types.iter().map(|t| *t == "sliding_attention").collect();
    sliding.resize(layers, false);
    Some(sliding)
}

/// 1 / sqrt(width): the attention scale of most families.
pub(super) fn inverse_sqrt(width: usize) -> f32 {
    (width as f64).powf(-0.5) as f32
}
